"""The command `shapo`: finds the command's module and turns what a user can put right into one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NoReturn, TextIO

from shapo import options, recipe
from shapo.console import lasting_streams, lost_output
from shapo.errors import UserError, explained
from shapo.launched import INTERRUPTED, LOST, Launch
from shapo.libraries import quiet_imports
from shapo.needs import check_needs
from shapo.ranks import Ranks

COMMANDS = (
    "demo",
    "sft",
    "probe",
    "reward",
    "select",
    "plan",
    "train",
    "sharpness",
    "evaluate",
    "judge",
    "attack",
    "data",
    "report",
    "import-gguf",
    "safety-pairs",
    "study",
    "bench",
)

_DESCRIPTION = """\
ShaPO: robust preference optimisation with sharpness-aware updates in an alignment-critical subspace (arXiv:2602.07340).

The usual way:  sft  ->  probe  ->  select  ->  sharpness (for rho)  ->  train  ->  evaluate.  `demo` does all of it
on generated data. Models are local folders or hub names; data are local .json, .jsonl, .csv or .parquet files (.gz too)
or hub names.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 1 nobody read the output, 2 bad input, 130 interrupted.

    What a file or an argument can cause is one line on stderr; a mistake in the program keeps its traceback.
    """
    with lasting_streams() as output:
        launch = Launch()
        code = _run(sys.argv[1:] if arguments is None else arguments, launch)
        output.flush()
        if code == 0 and output.failure is not None:
            told = lost_output(output)
            code = 1 if told is None else _complain(told, launch.stderr)
        return launch.end(code)


def _run(arguments: Sequence[str], launch: Launch) -> int:
    try:
        module, parsed = _parse(arguments)
        groups = _groups(parsed.command)
        values = recipe.merged(parsed, groups)
        ranks = launch.join(parsed.command, getattr(parsed, "device", "auto"))
        with _alone(module, parsed, ranks), warnings.catch_warnings():
            warnings.showwarning = _warn
            quiet_imports()
            if parsed.command in recipe.COMMANDS:
                recipe.require_kept(values, parsed, groups)
            module.run(parsed)
            if parsed.command in recipe.COMMANDS and ranks.is_main:
                recipe.write(values, parsed.command, groups)
    except KeyboardInterrupt as interrupt:
        if launch.speaks():
            print(f"shapo: interrupted{': ' if str(interrupt) else ''}{interrupt}", file=launch.stderr)
        return INTERRUPTED
    except Exception as error:
        return _failed(error, launch)
    return 0


def _failed(error: Exception, launch: Launch) -> int:
    """Tells of an error, and returns the exit code; raises a mistake of the program where this is the only process."""
    told = explained(error)
    if launch.count > 1:
        from shapo.libraries.torch import lost_a_rank

        # Before anything is said: the rank that has gone may have said what it was.
        told = LOST if lost_a_rank(error) else told
        if not launch.speaks():
            return 1
        if told is None:
            traceback.print_exception(error, file=launch.stderr)
            return 1
    if told is None:
        raise error
    return _complain(told, launch.stderr)


def _parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    for text in arguments:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the argument {text!a} is not UTF-8, so no report could name it") from None
        if "\0" in text:
            raise UserError(f"the argument {text!a} holds a null character")
        if text.startswith("--") and text.endswith("=--"):  # argparse would take it for an empty list
            raise UserError(f"{text.removesuffix('=--')} is given no value")
    expanded = recipe.expand(arguments, {name: _groups(name) for name in recipe.COMMANDS})
    parsed, unknown = build_parser().parse_known_args(expanded)
    if unknown:
        meant = recipe.did_you_mean(unknown, _groups(parsed.command))
        told = f"unrecognized arguments: {' '.join(unknown)}{meant}"
        raise UserError(f"{told} (see shapo {parsed.command} --help)")
    check_needs(_groups(parsed.command), parsed, arguments, expanded)
    return importlib.import_module(_module(parsed.command)), parsed


@contextmanager
def _alone(module: ModuleType, parsed: argparse.Namespace, ranks: Ranks) -> Iterator[None]:
    """Inside, no output of the command is one of its inputs, and nobody else writes where it does: rank 0 sees."""
    from shapo.storage.outputs import check_filled, check_outputs, locked, parts, sole_writer

    if not ranks.is_main:
        ranks.on_main(lambda: None)
        yield
        return

    groups = _groups(parsed.command)
    options.require_names(groups, parsed)
    whole, filled = (options.named_files(groups, parsed, use) for use in ("writes", "fills"))
    names = getattr(module, "REPLACES", ())
    replaced = whole + [(name, part) for name, folder in filled for part in parts(folder, names)]
    remade = getattr(module, "REMADE", "")
    replaced = [(name, path) for name, path in replaced if not (remade and path.match(remade))]
    read = options.named_files(groups, parsed, "reads")
    check_outputs(replaced, read)
    check_filled(filled, read)
    with ExitStack() as stack:
        for _, folder in filled:
            stack.enter_context(locked(folder, shared=getattr(module, "SHARED", False)))
        for _, path in whole:
            stack.enter_context(sole_writer(path))
        overwrite = getattr(parsed, "overwrite", None)
        if not getattr(parsed, "resume", False):  # which knows its own run by the checkpoint
            recipe.require_own(parsed.command, [*filled, *whole], names, overwrite=overwrite)
        ranks.on_main(lambda: None)  # the others wait for it
        yield


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="shapo", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"shapo {_version()}")
    added = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name in COMMANDS:
        module = importlib.import_module(_module(name))
        # Without abbreviations: a mistyped option is no other one, and a new one changes no old command line.
        command = added.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        options.add(command, _groups(name))
    return parser


def _groups(command: str) -> Sequence[options.Group]:
    own: Sequence[options.Group] = importlib.import_module(_module(command)).OPTIONS
    return [*own, options.Group(recipe.RecipeOption)] if command in recipe.COMMANDS else own


def _module(command: str) -> str:
    return f"shapo.commands.{command.replace('-', '_')}"


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # Where in the code it was given tells a user of the command nothing.
    if issubclass(category, UserWarning):
        print("shapo: warning: " + " ".join(str(message).split()), file=sys.stderr)


def _complain(message: str, stderr: TextIO) -> int:
    sys.stdout.flush()
    print("shapo: error: " + " ".join(message.split()), file=stderr)
    return 2


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("shapo-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed)"
