"""JSONL files that are written row by row and can be gone on with: answers, verdicts.

Rows go into a file beside the output, `<name>.part`, as they come; its first line says what they were made from. Once
all are there the output is written whole, in the asked order, and the part removed. A run that is stopped or killed
goes on from its part; one of other settings is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shapo.errors import UserError
from shapo.storage.files import atomic_file, json_line


class ResumableRows:
    """The rows of one output, each with a field `id` of its own.

    Args:
        path: The output.
        key: What the rows are made from; a part with another key is not gone on with.
        restart: Remove a part of another run in the place of refusing it.

    Raises:
        UserError: There is a part with another key, or it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], key: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.rows: dict[str, dict[str, Any]] = {}
        self._key = json.loads(json.dumps(dict(key)))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._read(restart)
            self._file = open(self.part, "a", encoding="utf-8")  # noqa: SIM115 (closed by finish or __exit__)
            if self._file.tell() == 0:
                self._file.write(json_line({"key": self._key}))
                self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.part}: {error.strerror or error}") from error

    def __enter__(self) -> ResumableRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows and hands them to the system at once."""
        rows = list(rows)
        try:
            self._file.write("".join(map(json_line, rows)))
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.part}: {error.strerror or error}") from error
        self.rows.update((row["id"], row) for row in rows)

    def finish(self, order: Sequence[str]) -> None:
        """Writes the output, a row for each id of `order`, and removes the part."""
        with atomic_file(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json_line(self.rows[identifier]) for identifier in order)
        self._file.close()
        self.part.unlink()

    def _read(self, restart: bool) -> None:
        if not self.part.exists():
            return
        whole, _, _ = self.part.read_bytes().rpartition(b"\n")  # a kill can have cut the last line
        lines = whole.decode("utf-8", errors="replace").split("\n") if whole else []
        try:
            values = [json.loads(line) for line in lines]
            key: dict[str, Any] = dict(values[0]["key"]) if values else {}
            rows = {row["id"]: row for row in values[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.part} is damaged; remove it to start anew") from error
        if key != self._key and values and not restart:
            differing = sorted(n for n in {*key, *self._key} if key.get(n) != self._key.get(n))
            raise UserError(
                f"{self.part} was begun with other settings ({', '.join(differing[:4])}); remove it to start anew, or "
                "name another output"
            )
        if key != self._key:
            self.part.unlink()
            return
        with open(self.part, "r+b") as file:
            file.truncate(len(whole) + 1)
        self.rows = rows
