"""Standard output and error that never end a run: what they cannot take is told once the work is saved."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class LastingStream:
    """A text stream whose failures are kept instead of raised.

    Args:
        stream: Where to write; None, which Python gives for a closed one, is nowhere.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (open as long as the process)
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        return self._tried(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _tried(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            self.failure = self.failure or error
            with suppress(OSError, ValueError):
                # What is still in its buffer goes nowhere, or Python would complain once more at its exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return None


@contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Inside, `sys.stdout` and `sys.stderr` raise nothing; yields the first."""
    _occupy_closed()
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    standard: Any = LastingStream(sys.stdout)
    errors: Any = LastingStream(sys.stderr)
    sys.stdout, sys.stderr = standard, errors
    try:
        yield standard
    finally:
        standard.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def lost_output(stream: LastingStream) -> str | None:
    """Why what was printed is lost, in one line; None where it is not, or where its reader has left."""
    failure = stream.failure
    if failure is None or failure.errno == errno.EPIPE:
        return None
    return f"cannot write to the standard output: {failure.strerror or failure}; every file of the command is written"


def _occupy_closed() -> None:
    """A file opened later must not become descriptor 1 or 2, where C libraries print."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
