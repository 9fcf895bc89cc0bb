"""Short digests of weights, tokens and subspaces, so that a cache or a checkpoint is never used with what it was not
made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from shapo.errors import UserError

_DIGEST_BYTES = 16


def digest_model(model: torch.nn.Module) -> str:
    """Digest of every parameter and persistent buffer, bit for bit."""
    return digest_tensors(model.state_dict())


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, dtypes, shapes and bits, in the order of the names."""
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        state.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """Digest of a sequence of values that JSON can hold."""
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for row in rows:
        state.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        state.update(b"\n")
    return state.hexdigest()


def require_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], path: object) -> None:
    """Refuses to go on with a checkpoint of another run.

    Raises:
        UserError: Naming the first entries that differ, with both values.
    """
    names = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    if names:
        shown = ", ".join(f"{name} was {saved.get(name)}, now {current.get(name)}" for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"{path} is the checkpoint of another run ({shown}{more}); start anew or repeat that run's options"
        )
