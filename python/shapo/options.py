"""Options as fields of dataclasses: each name, default and help text stands once.

A field made by `option` carries its help, its choices and how a text is read. `add` makes a command line of such
dataclasses, `read` makes a dataclass of what was parsed. Nothing here imports torch, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

from shapo.errors import UserError

Table = TypeVar("Table")

_KEY = "shapo.option"
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Option:
    """What a field tells besides its name and its default.

    Attributes:
        help: One line.
        of: Which choices of another option use this one (losses, methods); they stand before the help.
        needs: The option acts only where one of these conditions is met; see `shapo.needs`.
        parse: Makes the value of a text; raises `argparse.ArgumentTypeError` or `ValueError`.
        choices: The allowed values, where there are few.
        metavar: What stands for the value in the help.
        flag: The option's name where it is not the field's, with underscores.
        absent: What a default of None means, as text for the help.
        repeated: The option may be given several times, a positional one as several values; the value is a list.
        required: A repeated option that must be given at least once; others are so where they have no default.
        alone: Options of one command with the same `alone` exclude each other.
        positional: The value stands by itself, without the option's name.
        reads: The value is, or names, a file or folder that is read.
        writes: The value is a file or folder that is replaced whole.
        fills: The value is a folder in which the command replaces the names of its module's `REPLACES`.
        optimizers: The value is a keyword argument of `shapo_kernels.ShaPOOptimizer`, under the field's name.
    """

    help: str
    of: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    flag: str | None = None
    absent: str | None = None
    repeated: bool = False
    required: bool = False
    alone: str | None = None
    positional: bool = False
    reads: bool = False
    writes: bool = False
    fills: bool = False
    optimizers: bool = False


def option(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A dataclass field that is an option; without a default it is required. `more`: see `Option`."""
    if "parse" not in more and isinstance(default, (int, float)):
        more["parse"] = float if isinstance(default, float) else whole
    given: dict[str, Any] = {"default_factory": list} if more.get("repeated") else {"default": default}
    return dataclasses.field(**given, metadata={_KEY: Option(help, **more)})


def same(table: type, name: str, **changes: Any) -> Any:
    """The option `name` of another table, for a command that takes some of its options; `changes`: see `option`."""
    field = next(field for field in dataclasses.fields(table) if field.name == name)
    told = vars(field.metadata[_KEY])
    return option(**{"default": field.default, **told, **changes})


@dataclass(frozen=True)
class Group:
    """The options of one dataclass on a command line.

    Attributes:
        table: The dataclass.
        title: Heading in the help; without one the options stand among the command's own.
        defaults: A command's own defaults, by field.
        helps: A command's own help texts, by field.
        needs: A command's own conditions, by field, beside those of the option; see `shapo.needs`.
        optional: Nothing of it is required: what is not given is None.
        given_only: What is not given is None, whatever the default, so that a command can tell what was asked for.
    """

    table: type
    title: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    helps: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    optional: bool = False
    given_only: bool = False


def declared(table: type) -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """Name on the command line, with underscores -> the field and its option."""
    found = [(field, field.metadata[_KEY]) for field in dataclasses.fields(table) if _KEY in field.metadata]
    return {told.flag or field.name: (field, told) for field, told in found}


def add(parser: argparse.ArgumentParser, groups: Sequence[Group]) -> None:
    """Adds the options of `groups` to a parser, in their order."""
    titled: dict[str, Any] = {}
    exclusive: dict[str, Any] = {}
    for group in groups:
        if group.title is not None and group.title not in titled:
            titled[group.title] = parser.add_argument_group(group.title)
        target = parser if group.title is None else titled[group.title]
        for name, (field, told) in declared(group.table).items():
            place = target
            if told.alone is not None:
                if told.alone not in exclusive:
                    exclusive[told.alone] = target.add_mutually_exclusive_group()
                place = exclusive[told.alone]
            given = (name,) if told.positional else (typed(name),)
            argument = _argument(group, field, told)
            place.add_argument(*given, **argument)
            if argument.get("action") == "store_true":
                # What takes back a recipe's true; one line of the help tells of all of them.
                back = {"dest": name, "action": "store_false", "default": argument["default"]}
                place.add_argument(typed(f"no_{name}"), help=argparse.SUPPRESS, **back)


def read(table: type[Table], parsed: argparse.Namespace, **more: Any) -> Table:
    """The dataclass of what was parsed; what is None there keeps its default. `more` are further fields.

    Raises:
        UserError: From the dataclass, for a value that cannot be meant.
    """
    values = {field.name: getattr(parsed, name, None) for name, (field, _) in declared(table).items()}
    return table(**{name: value for name, value in values.items() if value is not None}, **more)


def named_files(groups: Sequence[Group], parsed: argparse.Namespace, use: str) -> list[tuple[str, Path]]:
    """Options, as they are typed, and the paths that they give; `use` is "reads", "writes" or "fills"."""
    found = []
    for group in groups:
        for name, (_, told) in declared(group.table).items():
            value = getattr(parsed, name, None)
            if value and getattr(told, use):
                for text in value if isinstance(value, list) else [value]:
                    # An input may be NAME=FILE or FILE:WEIGHT.
                    forms = {text.partition("=")[2], text.rpartition(":")[0]} - {""} if use == "reads" else set()
                    shown = str(told.metavar) if told.positional else typed(name)
                    found += [(shown, Path(form).expanduser()) for form in {text, *forms}]
    return found


def require_names(groups: Sequence[Group], parsed: argparse.Namespace) -> None:
    """Raises UserError for a file or folder without a name, which would pass for one that was not given."""
    for group in groups:
        for name, (_, told) in declared(group.table).items():
            value = getattr(parsed, name, None)
            if (told.reads or told.writes or told.fills) and (value == "" or (isinstance(value, list) and "" in value)):
                raise UserError(f"{typed(name)} is empty, but the name of a file or folder is expected")


def given(table: type, parsed: argparse.Namespace) -> list[str]:
    """The options of a `given_only` group that were given, as they are typed."""
    return [typed(name) for name in declared(table) if getattr(parsed, name, None) is not None]


def fill(table: type, parsed: argparse.Namespace) -> None:
    """Puts in the defaults of a `given_only` group where nothing was given."""
    for name, (field, _) in declared(table).items():
        if getattr(parsed, name, None) is None:
            setattr(parsed, name, None if field.default is MISSING else field.default)


def typed(name: str) -> str:
    """An option's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def whole(text: str) -> int:
    """A whole number that 64 bits hold."""
    return _whole(text, -_LARGEST, "a whole number is expected")


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, "a whole number of at least 1 is expected")


def seed_number(text: str) -> int:
    """What torch takes as a seed."""
    return _whole(text, 0, "a whole number from 0 to 2 ** 63 - 1 is expected")


def _whole(text: str, least: int, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r}, but {expected}")
    return value


def radii(text: str) -> list[float]:
    """Finite numbers above 0, separated by commas; as far as float32 weights can tell."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(1e-30 <= value <= 1e30 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r}, but numbers above 0 (1e-30 to 1e30) separated by commas are expected"
        )
    return values


def radius(text: str) -> float | tuple[float, float]:
    """A number, or two as `low,high`."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r}, but a number, or low,high, is expected")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _argument(group: Group, field: dataclasses.Field[Any], told: Option) -> dict[str, Any]:
    default = group.defaults.get(field.name, field.default)
    shown = told.absent if default is None else _shown(default)
    help = "".join([", ".join(told.of), ": " if told.of else "", group.helps.get(field.name, told.help)])
    if shown is not None:
        help += f" (default: {shown})"
    if told.repeated and told.positional:
        return {"help": help, "metavar": told.metavar, "type": told.parse, "nargs": "+"}
    if told.repeated:
        return {
            "help": help,
            "metavar": told.metavar,
            "type": told.parse,
            "action": "append",
            "required": told.required and not group.optional,
            "default": None if group.given_only else [],
        }
    if default is False:
        return {"help": help, "action": "store_true", "default": None if group.given_only else False}
    argument: dict[str, Any] = {"help": help, "metavar": told.metavar, "type": told.parse}
    if told.choices:
        argument["choices"] = told.choices
    if told.positional:
        return argument
    if default is MISSING:
        return {**argument, "required": not group.optional}
    return {**argument, "default": None if group.given_only else default}


def _shown(value: Any) -> str | None:
    """A default as it is typed; None where nothing is to be shown."""
    if value is MISSING or value is False:
        return None
    if isinstance(value, (list, tuple)):
        return ",".join(f"{item:g}" for item in value) if value else None
    return f"{value:g}" if isinstance(value, float) else str(value)
