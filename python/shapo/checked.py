"""One check of what an option is: a text is true to `if`, None is false, and True is a number."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

Checked = TypeVar("Checked", bound=Callable[..., Any])

# What an annotation names -> what it takes, and how an error calls it.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    "float": (lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "None": (lambda value: value is None, "None"),
}


def checked(function: Checked) -> Checked:
    """A function, or a class by its constructor, whose options must be of the kinds that their annotations name.

    `bool`, `int`, `float`, `str`, and unions of them with each other and None; other annotations are left alone.

    Raises:
        TypeError: at a call with another kind.
    """
    wanted = _wanted(function)
    inner: Any = vars(function)["__init__"] if inspect.isclass(function) else function
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kinds = wanted.get(name)
            if kinds and not any(_KINDS[kind][0](value) for kind in kinds):
                expected = " or ".join(_KINDS[kind][1] for kind in kinds)
                raise TypeError(f"{name} is {value!r}: expected {expected}")
        return inner(*args, **kwargs)

    if not inspect.isclass(function):
        return outer  # type: ignore[return-value]
    function.__init__ = outer  # type: ignore[method-assign]
    return function


def _wanted(function: Callable[..., Any]) -> dict[str, list[str]]:
    """Parameter -> the kinds of its annotation, where all of them can be told. Annotations are texts here."""
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        kinds = [kind.strip() for kind in str(parameter.annotation).split("|")]
        if set(kinds) <= set(_KINDS) and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            found[parameter.name] = kinds
    return found
