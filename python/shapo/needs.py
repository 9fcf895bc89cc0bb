"""Options that have no effect beside the others of a command line: said in one line, before anything is done.

An option or its group declares conditions, of which one must be met:

    data             --data is given, and is not 0 or empty
    !published       --published is not given
    rho=*            --rho is given, be it 0
    judge=judgezoo:* the value of --judge matches, or one of its values where it is given several times
    a+b              both
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import MISSING
from fnmatch import fnmatchcase

from shapo.errors import UserError
from shapo.options import Group, declared, typed


def check_needs(
    groups: Sequence[Group], parsed: argparse.Namespace, line: Sequence[str], recipe: Sequence[str]
) -> None:
    """Refuses options that have no effect.

    A sweep may pass through 0: `--noise 0 --noise-seed 1` is no mistake, and nor is `--eval-every 0`.

    Args:
        groups: The command's options.
        parsed: Their values.
        line: The arguments as they were given.
        recipe: The same with those of a recipe; its defaults may stand there without an effect.

    Raises:
        UserError: One of them has none.
    """
    on_line, anywhere = _named(line), _named(recipe)
    for group in groups:
        for name, (field, _) in declared(group.table).items():
            default = group.defaults.get(field.name, None if field.default is MISSING else field.default)
            value = getattr(parsed, name, None)
            asked = (name in on_line and (value or value != default)) or (name in anywhere and value != default)
            if asked and (missing := unmet(group, name, parsed, anywhere)):
                raise UserError(f"{typed(name)} has no effect {_told(missing)}")


def unmet(group: Group, name: str, parsed: argparse.Namespace, named: Collection[str] = ()) -> tuple[str, ...]:
    """The conditions of an option of `group` of which none is met; nothing where it acts.

    An option in `named` passes for given, be it 0.
    """
    field, told = declared(group.table)[name]
    for conditions in (told.needs, group.needs.get(field.name, ())):
        if conditions and not any(_met(condition, parsed, named) for condition in conditions):
            return conditions
    return ()


def _met(condition: str, parsed: argparse.Namespace, named: Collection[str]) -> bool:
    return all(part in named or _holds(part, parsed) for part in condition.split("+"))


def _holds(part: str, parsed: argparse.Namespace) -> bool:
    if part.startswith("!"):
        return not getattr(parsed, part[1:])
    name, equals, pattern = part.partition("=")
    value = getattr(parsed, name)
    values = value if isinstance(value, list) else [value]
    return any(v is not None and fnmatchcase(str(v), pattern) for v in values) if equals else bool(value)


def _told(conditions: Sequence[str]) -> str:
    if all(condition.startswith("!") for condition in conditions):
        return "with " + " or ".join(typed(condition[1:]) for condition in conditions)
    wanted = [condition for condition in conditions if not condition.startswith("!")]
    return "without " + " or ".join(" and ".join(map(_shown, condition.split("+"))) for condition in wanted)


def _shown(part: str) -> str:
    name, equals, pattern = part.partition("=")
    return f"{typed(name)} {pattern.replace('*', 'NAME')}" if equals and pattern != "*" else typed(name)


def _named(arguments: Sequence[str]) -> set[str]:
    return {text.partition("=")[0][2:].replace("-", "_") for text in arguments if text.startswith("--")}
