"""Saving a run so that it goes on bit for bit, and loading it only into the same run.

A checkpoint is one file that `torch.load(weights_only=True)` reads: model, optimizer, scheduler, random states, the
order of the data, the position in it, and the fingerprint of the run.  It is written atomically: a full disk leaves the
previous one.
"""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from shapo.errors import UserError, first_line
from shapo.storage.files import atomic_file
from shapo.storage.fingerprint import require_same_run
from shapo.training.order import DataOrder

_FORMAT = 1
_ENTRIES: dict[str, type] = {
    "run": dict,
    "update": int,
    "model": dict,
    "optimizer": dict,
    "scheduler": dict,
    "random": dict,
    "order": dict,
    "metrics_position": int,
}


class Stateful(Protocol):
    """An optimizer, a ShaPOOptimizer or a scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    run: Mapping[str, Any],
    update: int,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    scheduler: Stateful,
    order: DataOrder,
    metrics_position: int,
    random_states: Sequence[Mapping[str, Any]],
    engine: str | None = None,
) -> None:
    """Writes everything that the updates after number `update` depend on.

    Args:
        model, optimizer: Their states, as one process has them.
        random_states: `random_state` of each rank.
        engine: The one that alone can go on, with as many ranks; None where all can.

    Raises:
        UserError: The file could not be written; the previous checkpoint at `path` is intact.
    """
    epoch = update // order.updates_per_epoch
    state = {
        "format": _FORMAT,
        "run": dict(run),
        "update": update,
        "model": dict(model),
        "optimizer": dict(optimizer),
        "scheduler": scheduler.state_dict(),
        "random": dict(random_states[0]),
        "random_of_others": [dict(state) for state in random_states[1:]],
        "engine": engine,
        "order": {"epoch": epoch, "permutation": order.permutation(epoch)},
        "metrics_position": metrics_position,
    }
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path: str | os.PathLike[str], run: Mapping[str, Any], *, mapped: bool = False) -> dict[str, Any]:
    """Reads a checkpoint and makes sure that it belongs to `run`; `mapped`, its tensors are read when they are used.

    Raises:
        UserError: No such file, not a checkpoint, damaged, or of another run.
    """
    if not Path(path).is_file():
        if (Path(path).parent / "run.json").exists():
            raise UserError(f"{Path(path).parent} is finished and left no checkpoint; --overwrite replaces it")
        raise UserError(f"there is no checkpoint {path} to resume from; run without --resume first")
    try:
        with zipfile.ZipFile(path) as file:  # torch writes checksums, and does not look at them
            damaged = file.testzip()
        state = load(path, mapped=mapped) if damaged is None else None
    except Exception as error:  # what the unpickler says of other bytes has no common base: KeyError, EOFError ...
        raise UserError(f"{path} is damaged or no checkpoint: {first_line(error)}") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is another; start anew, or from a copy")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{path} is no checkpoint of this version (format {_FORMAT})")
    wrong = [name for name, kind in _ENTRIES.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise UserError(f"{path} is no whole checkpoint: {', '.join(wrong)} is missing or of another type")
    require_same_run(state["run"], run, path)
    return state


def load(path: str | os.PathLike[str], *, mapped: bool) -> Any:
    """The state in a file that `read_checkpoint` has accepted."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def restore(
    state: Mapping[str, Any],
    *,
    model: Stateful,
    optimizer: Stateful,
    scheduler: Stateful,
    order: DataOrder,
    updates: int,
    rank: int = 0,
    engine: str | None = None,
) -> int:
    """Puts a checkpoint's state into the objects of a run of `updates` updates, and returns the number of those done.

    A rank that the run did not have when it was saved keeps its random state.

    Raises:
        UserError: A part does not fit, or this version of torch draws another order of the data than the one that
            wrote the checkpoint.
    """
    if state.get("engine") != engine:
        raise UserError(
            f"the checkpoint is of {state.get('engine') or 'one process, DDP or FSDP2'}, and this run of "
            f"{engine or 'one process, DDP or FSDP2'}: go on as it was started"
        )
    try:
        same_order = torch.equal(order.permutation(state["order"]["epoch"]), state["order"]["permutation"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        states = [state["random"], *state.get("random_of_others", ())]
        if rank < len(states):
            _set_random_state(states[rank])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit this run: {first_line(error)}") from error
    if not same_order:
        raise UserError(
            "this version of torch draws another order of the data than the one the checkpoint was written with"
        )
    if not (0 <= state["update"] <= updates and state["metrics_position"] >= 0):
        raise UserError(f"the checkpoint is of update {state['update']}, and the run has {updates}")
    return int(state["update"])


def random_state() -> dict[str, Any]:
    """The random states of this process."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": devices, "python": random.getstate()}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
