"""What a run writes as it goes: metrics.jsonl and the trackers, by rank 0 alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from shapo.ranks import Ranks
from shapo.training.metrics import MetricsLog
from shapo.training.trackers import Trackers


class Journal:
    """A context on every rank. All of them hand the same numbers over; the others than rank 0 write none.

    Args:
        ranks: The processes of the run.
        path: metrics.jsonl.
        position: Its length to keep; see `MetricsLog`.
        trackers: Of `config.TRACKERS`.
        config: What the run was told, for the trackers.

    Raises:
        UserError: On entering, on every rank (a collective): a tracker does not start, or the file cannot be written.
    """

    def __init__(
        self, ranks: Ranks, path: Path, *, position: int, trackers: Sequence[str], config: Mapping[str, Any]
    ) -> None:
        self._ranks, self._path, self._start = ranks, path, position
        self._names, self._config = trackers, config
        self._log: MetricsLog | None = None
        self._open = ExitStack()

    def __enter__(self) -> Journal:
        try:
            self._ranks.on_main(self._begin)
        except BaseException:
            self._open.close()
            raise
        return self

    def write(self, kind: str, values: Mapping[str, Any], *, tracked: bool = True) -> None:
        """A line of metrics.jsonl, and its numbers for the trackers; `values` has the number of the `update`."""
        if self._log is not None:
            self._log.write(kind, values)
            if tracked:
                numbers = {name: value for name, value in values.items() if name != "update"}
                self._trackers.log(kind, numbers, values["update"])

    @property
    def position(self) -> int:
        """Length of metrics.jsonl in bytes; 0 on other ranks than 0."""
        return 0 if self._log is None else self._log.position

    def _begin(self) -> None:
        # Trackers first: one that does not start leaves no metrics.jsonl, which would pass for a run.
        self._trackers = self._open.enter_context(Trackers(self._names, self._path.parent, self._config))
        self._log = self._open.enter_context(MetricsLog(self._path, position=self._start))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
