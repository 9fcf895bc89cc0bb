"""Recipes: the options of a command in a YAML file (`--config`); the command line wins over them.

A recipe becomes arguments that stand before those of the command line, so both are read and checked in one way. Nothing
here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

from shapo.errors import UserError
from shapo.needs import unmet
from shapo.options import Group, Option, declared, option, typed, whole

COMMANDS = ("demo", "sft", "probe", "select", "train", "sharpness", "evaluate", "judge", "attack", "reward")

RECIPE = "recipe.yaml"
PRESETS = Path(__file__).parent / "recipes"

Options = Mapping[str, tuple["Field[Any]", Option]]

# What YAML may give for an option, by how a text is read. PyYAML reads 1e-5, which has no point, as text.
_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text (in quotes)"),
    int: ((int,), "a whole number"),
    whole: ((int,), "a whole number"),
    float: ((str, int, float), "a number"),
}

# What other libraries call these options.
_ALIASES = {"learning_rate": "lr", "batch": "batch_size"}

# What a run does with what is there already belongs to one call, not to the recipe.
_OF_ONE_CALL = ("config", "resume", "overwrite", "push_to_hub")


@dataclass(frozen=True)
class RecipeOption:
    """For all commands with an output."""

    config: str | None = option(
        "YAML file of this command's options, or a shipped recipe by its name (names: docs/cli.md#recipes); the "
        "command line wins (--no-X takes back an X: true)",
        None,
        metavar="RECIPE",
        reads=True,
    )


def options_of(groups: Sequence[Group]) -> Options:
    """Name on the command line, with underscores -> field and option, for all options of a command."""
    return {name: found for group in groups for name, found in declared(group.table).items()}


def expand(arguments: Sequence[str], commands: Mapping[str, Sequence[Group]]) -> list[str]:
    """The arguments with those of the recipe put before them; unchanged without `--config`.

    Args:
        arguments: A command line, the command first.
        commands: The options of every command.

    Raises:
        UserError: No such recipe, no YAML, an unknown key, a key of another command, a value of the wrong type.
    """
    if not arguments or arguments[0] not in COMMANDS:
        return list(arguments)
    command, given = arguments[0], list(arguments[1:])
    name = _config(given)
    if name is None:
        return list(arguments)
    path = _find(name)
    own = options_of(commands[command])
    on_line = {text.split("=")[0] for text in given if text.startswith("--")}
    chosen = {own[key][1].alone for key in own if typed(key) in on_line} - {None}
    recipe: list[str] = []
    for key, value in _read(path).items():
        found = own.get(key)
        if found is None or key in _OF_ONE_CALL:
            raise UserError(_unknown(path, key, command, commands))
        tokens = _tokens(path, key, *found, value)
        if on_line.isdisjoint((typed(key), typed(f"no_{key}"))) and found[1].alone not in chosen:
            recipe += tokens
    return [command, *recipe, *given]


def merged(parsed: argparse.Namespace, groups: Sequence[Group]) -> dict[str, Any]:
    """The recipe of a parsed command line, with the defaults that it did not mention; what is unset or has no effect
    is left out.
    """
    acting = [
        name
        for group in groups
        for name in declared(group.table)
        if name not in _OF_ONE_CALL and not unmet(group, name, parsed)
    ]
    values = {name: getattr(parsed, name, None) for name in acting}
    return {name: value for name, value in values.items() if value is not None and value != []}


def write(values: Mapping[str, Any], command: str, groups: Sequence[Group]) -> Path:
    """Writes a merged recipe beside what the command wrote: into its folder, or as FILE.recipe.yaml."""
    from shapo.storage.files import write_text

    path = _place(values, groups)
    # A name that would break the comment, and with it the YAML, is not written.
    named = shlex.quote(str(path)) if str(path).isprintable() else "RECIPE"
    write_text(path, f"# shapo {command} --config {named}\n{_dumped(values)}")
    return path


def require_kept(values: Mapping[str, Any], parsed: argparse.Namespace, groups: Sequence[Group]) -> None:
    """Refuses a command whose recipe, once written, would change the one that it was given.

    Raises:
        UserError: So it is, and neither --overwrite nor --resume was given.
    """
    import yaml

    if parsed.config is None or getattr(parsed, "overwrite", False) or getattr(parsed, "resume", False):
        return
    path, given = _place(values, groups), Path(parsed.config)
    if not (given.exists() and path.exists() and given.samefile(path)):
        return
    if yaml.safe_load(given.read_text(encoding="utf-8")) != yaml.safe_load(_dumped(values)):
        raise UserError(f"--output would change the recipe {path}, which --config reads; choose another output")


def require_own(
    command: str, outputs: Sequence[tuple[str, Path]], replaces: Sequence[str], *, overwrite: bool | None = None
) -> None:
    """Refuses an output where another command has written: its recipe there would be lost, and its run with it.

    Args:
        command: The command that is going to write.
        outputs: Option and path of each file or folder.
        replaces: The names that the command replaces in a folder.
        overwrite: Whether to write all the same; None where the command has no such option.

    Raises:
        UserError: There is another command's recipe, or a training run, which has none before it is finished.
    """
    if overwrite:
        return
    instead = "choose another output" if overwrite is None else "choose another output, or add --overwrite"
    for name, path in outputs:
        for place in (path / RECIPE, path.parent / f"{path.name}.{RECIPE}"):
            other = _writer(place)
            if other not in (None, command):
                raise UserError(f"{name} is {path}, but {place} is of a finished `shapo {other}`; {instead}")
        if "metrics.jsonl" not in replaces and (path / "metrics.jsonl").is_file():
            raise UserError(f"{name} is {path}, but a training run lies there (metrics.jsonl); {instead}")


def _writer(path: Path) -> str | None:
    """The command that wrote a merged recipe; None where there is none, or nobody knows."""
    try:
        if not path.is_file():  # nor a pipe, which would be waited for
            return None
        with path.open("rb") as file:
            match = re.match(rb"# shapo ([a-z-]+) --config ", file.read(80))
    except (OSError, ValueError):
        return None
    return match[1].decode() if match else None


def _place(values: Mapping[str, Any], groups: Sequence[Group]) -> Path:
    output = Path(values["output"])
    if options_of(groups)["output"][1].fills:
        return output / RECIPE
    return output.with_name(f"{output.name}.{RECIPE}")


def _dumped(values: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120))


def _config(given: Sequence[str]) -> str | None:
    """The value of the last `--config`; argparse complains where it has none."""
    name = None
    for text, following in zip(given, [*given, None][1:], strict=True):
        if text == "--config":
            name = following
        elif text.startswith("--config="):
            name = text.partition("=")[2]
    return name


def _find(name: str) -> Path:
    path, preset = Path(name), PRESETS / f"{name}.yaml"
    if not path.exists() and os.sep not in name and preset.is_file():
        return preset
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise UserError(f"there is no recipe {name}: give a YAML file, or one of {shipped}")
    return path


def _read(path: Path) -> dict[str, Any]:
    """The recipe's keys, with underscores, and values as YAML has them."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        raise UserError(f"the recipe {path} is not YAML{where}: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"the recipe {path} is a {type(content).__name__}, but lines of `option: value` are expected")
    keys = [str(key.value).replace("-", "_") for key, _ in tree.value]
    for key in keys:
        # YAML itself keeps the last of them without a word.
        if keys.count(key) > 1:
            raise UserError(f"the recipe {path} has {key} twice; leave one of them")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _unknown(path: Path, key: str, command: str, commands: Mapping[str, Sequence[Group]]) -> str:
    if key in _OF_ONE_CALL:
        return f"{path}: {key} belongs on the command line, not into a recipe"
    own = [name for name in options_of(commands[command]) if name not in _OF_ONE_CALL]
    near = _nearest(key, own)
    hint = f"; did you mean {near}?" if near else f"; `shapo {command} --help` lists those it has"
    others = [other for other in COMMANDS if key in options_of(commands[other])]
    if others:
        return f"{path}: {key} is an option of {', '.join(others)}, not of {command}{hint}"
    return f"{path}: {command} has no option {key}{hint}"


def _nearest(key: str, own: Sequence[str]) -> str | None:
    """The option that was meant; None where none is near."""
    near = [name for name in [_ALIASES.get(key)] if name in own] or difflib.get_close_matches(key, own, 1, cutoff=0.75)
    return near[0] if near else None


def did_you_mean(arguments: Sequence[str], groups: Sequence[Group]) -> str:
    """What to say of the first option that a command does not have: the one that was meant, or nothing."""
    own = [name for name, (_, told) in options_of(groups).items() if not told.positional]
    for text in arguments:
        if text.startswith("--"):
            near = _nearest(text.partition("=")[0][2:].replace("-", "_"), own)
            return f"; did you mean {typed(near)}?" if near else ""
    return ""


def _tokens(path: Path, key: str, field: Field[Any], told: Option, value: Any) -> list[str]:
    """One option of a recipe as arguments; raises UserError for a value of the wrong type."""
    if field.default is False:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is {value!r}, but true or false is expected")
        return [typed(key)] if value else []
    if value is None and field.default is None:
        return []
    values = value if told.repeated and isinstance(value, list) else [value]
    return [f"{typed(key)}={_text(path, key, told, item)}" for item in values]


def _text(path: Path, key: str, told: Option, value: Any) -> str:
    kinds, expected = _TYPES.get(told.parse, ((str, int, float), "a number, or several,"))
    wrong = UserError(f"{path}: {key} is {value!r}, but {expected} is expected")
    if isinstance(value, bool) and {"on", "off"} <= set(told.choices):
        value = "on" if value else "off"  # YAML 1.1 reads these words so
    listed = isinstance(value, list) and told.parse not in (str, int, float)
    numbers = value if listed else [value]
    if any(isinstance(number, bool) or not isinstance(number, kinds) for number in numbers):
        raise wrong
    text = ",".join(str(number) for number in numbers)
    if told.choices and text not in told.choices:
        near = difflib.get_close_matches(text, told.choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{path}: {key} is {text!r}, but one of {', '.join(told.choices)} is expected{hint}")
    try:
        told.parse(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: {key} is {error}") from error
    except ValueError as error:
        raise wrong from error
    return text
