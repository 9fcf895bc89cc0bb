"""TensorBoard, Weights & Biases and trackio beside metrics.jsonl, through Accelerate's trackers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shapo.errors import UserError, first_line
from shapo.notes import note

PROJECT = "shapo"

_CLASSES = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "trackio": "TrackioTracker"}


class Trackers:
    """The trackers of one run; each gets every number of an update and an evaluation, as `update/loss` and so on.

    A context: entering starts them, leaving finishes them. metrics.jsonl does not depend on them.

    Args:
        names: Of `config.TRACKERS`.
        output: The run's folder. TensorBoard's events are under its `tensorboard`; its name is the run's name.
        config: What the run was told, kept as its configuration.

    Raises:
        UserError: A tracker does not start. One that fails later is left out, with a note: training goes on.
    """

    def __init__(self, names: Sequence[str], output: Path, config: Mapping[str, Any]) -> None:
        self._names, self._output, self._config = names, output, config
        self._running: list[Any] = []

    def __enter__(self) -> Trackers:
        for name in self._names:
            try:
                self._running.append(self._start(name))
            except Exception as error:  # each tracker has errors of its own
                self._finish()
                apart = name == "wandb" and os.environ.get("WANDB_MODE") != "offline"
                hint = "; without an account WANDB_MODE=offline keeps the run in the output folder" if apart else ""
                raise UserError(f"--report-to {name} does not start: {first_line(error)}{hint}") from error
        return self

    def log(self, kind: str, values: Mapping[str, Any], update: int) -> None:
        """Hands the numbers in `values` on, those of mappings inside too."""
        numbers = dict(_numbers(kind, values))
        for tracker in list(self._running):
            try:
                tracker.log(numbers, step=update)
            except Exception as error:  # as in __enter__
                self._running.remove(tracker)
                note(f"{tracker.name} failed and gets no more: {first_line(error)}; metrics.jsonl has everything")

    def _start(self, name: str) -> Any:
        made = getattr(importlib.import_module("accelerate.tracking"), _CLASSES[name])
        # Accelerate's trackers log through a logger that wants this state; without an Accelerator nobody else makes it.
        importlib.import_module("accelerate").PartialState()
        if name == "tensorboard":
            tracker = made("tensorboard", self._output)
        elif name == "wandb":
            tracker = made(PROJECT, name=self._output.resolve().name, dir=str(self._output))
        else:
            tracker = made(PROJECT, name=self._output.resolve().name)
        tracker.start()
        plain = (bool, int, float, str)
        told = {key: value if isinstance(value, plain) else str(value) for key, value in self._config.items()}
        tracker.store_init_configuration(told)
        return tracker

    def _finish(self) -> None:
        while self._running:
            tracker = self._running.pop()
            try:
                tracker.finish()
            except Exception as error:  # as in __enter__
                note(f"{tracker.name} did not finish: {first_line(error)}; metrics.jsonl has everything")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()


def _numbers(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            found += _numbers(name, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((name, float(value)))
    return found
