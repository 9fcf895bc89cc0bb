"""Saving a run so that it goes on bit for bit, and loading it only into the same run.

A checkpoint is one file that `torch.load(weights_only=True)` reads: model, optimizer, scheduler, random states, the
order of the data, the position in it, and the fingerprint of the run.  It is written atomically: a full disk leaves the
previous one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from shapo.errors import UserError
from shapo.storage.files import atomic_file
from shapo.storage.fingerprint import require_same_run
from shapo.training.order import DataOrder

_FORMAT = 1


class Stateful(Protocol):
    """An optimizer, a ShaPOOptimizer or a scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    run: Mapping[str, Any],
    update: int,
    model: torch.nn.Module,
    optimizer: Stateful,
    scheduler: Stateful,
    order: DataOrder,
    metrics_position: int,
) -> None:
    """Writes everything that the updates after number `update` depend on.

    Raises:
        UserError: The file could not be written; the previous checkpoint at `path` is intact.
    """
    epoch = update // order.updates_per_epoch
    state = {
        "format": _FORMAT,
        "run": dict(run),
        "update": update,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": _random_state(),
        "order": {"epoch": epoch, "permutation": order.permutation(epoch)},
        "metrics_position": metrics_position,
    }
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path: str | os.PathLike[str], run: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint and makes sure that it belongs to `run`.

    Raises:
        UserError: No such file, not a checkpoint, damaged, or of another run.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path} to resume from; run without --resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler says of other bytes has no common base: KeyError, EOFError ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{path} is no checkpoint of this version (format {_FORMAT})")
    require_same_run(state["run"], run, path)
    return state


def restore(
    state: Mapping[str, Any], *, model: torch.nn.Module, optimizer: Stateful, scheduler: Stateful, order: DataOrder
) -> int:
    """Puts a checkpoint's state into the objects of a run and returns the number of updates done.

    Raises:
        UserError: This version of torch draws another order of the data than the one that wrote the checkpoint.
    """
    if not torch.equal(order.permutation(state["order"]["epoch"]), state["order"]["permutation"]):
        raise UserError(
            "this version of torch draws another order of the data than the one the checkpoint was written with"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    _set_random_state(state["random"])
    return int(state["update"])


def _random_state() -> dict[str, Any]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": devices, "python": random.getstate()}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
