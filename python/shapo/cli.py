"""The command `shapo`: finds the command's module and turns what a user can put right into one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from shapo import options
from shapo.errors import UserError

COMMANDS = (
    "demo",
    "sft",
    "probe",
    "reward",
    "select",
    "train",
    "sharpness",
    "evaluate",
    "judge",
    "attack",
    "report",
    "import-gguf",
    "safety-pairs",
    "study",
    "bench",
)

_DESCRIPTION = """\
ShaPO: robust preference optimisation with sharpness-aware updates in an alignment-critical subspace (arXiv:2602.07340).

The usual way:  sft  ->  probe  ->  select  ->  train  ->  evaluate, sharpness.  `demo` does all of it on generated
data. Models are local folders or hub names; data are local .json, .jsonl, .csv or .parquet files (.gz too) or hub
names.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    try:
        parsed = build_parser().parse_args(arguments)
        importlib.import_module(_module(parsed.command)).run(parsed)
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt as interrupt:
        print(f"shapo: interrupted{': ' if str(interrupt) else ''}{interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__name__ not in ("SubspaceError", "OutOfMemoryError"):
            raise
        return _complain(str(error))
    return 0


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
        options.add(command, module.OPTIONS)
    return parser


def _module(command: str) -> str:
    return f"shapo.commands.{command.replace('-', '_')}"


def _complain(message: str) -> int:
    # A progress bar may have left the cursor in the middle of a line.
    sys.stdout.flush()
    print("shapo: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("shapo-kernels")
    except metadata.PackageNotFoundError:
        return "(not installed)"
