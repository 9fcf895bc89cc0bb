"""One line of JSON for each update and each evaluation, and cut back to the right line when a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shapo.errors import UserError
from shapo.storage.files import json_line


class MetricsLog:
    """An append-only JSONL file whose length is part of a checkpoint.

    Args:
        path: The file.  A new log replaces an old one.
        position: Length in bytes to keep, when a run is resumed: what an interrupted run wrote after its checkpoint is
            cut off.

    Raises:
        UserError: The file cannot be written, or is shorter than `position`.
    """

    def __init__(self, path: str | os.PathLike[str], *, position: int = 0) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "r+b" if position else "wb")  # noqa: SIM115 (held until close)
            if self._file.seek(0, os.SEEK_END) < position:
                self._file.close()
                raise UserError(f"{self.path} is shorter than the checkpoint remembers; it was changed since")
            self._file.truncate(position)
            self._file.seek(position)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """Appends `{"kind": kind, **values}` and hands it to the operating system."""
        try:
            self._file.write(json_line({"kind": kind, **values}).encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    @property
    def position(self) -> int:
        """Length in bytes."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file, of one kind ("update", "evaluation") or all.

    A last line that a kill has cut is passed over.

    Raises:
        UserError: It cannot be read, or a line is damaged.
    """
    return [row for row in _rows(Path(path)) if kind is None or row["kind"] == kind]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            row = None
        if not isinstance(row, dict) or "kind" not in row:
            raise UserError(f"{path}, line {number} is damaged: expected a JSON object with a kind")
        yield row
