"""Agreement between ranks: every rank moves along the same direction, that of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def data_parallel_ranks(model: nn.Module) -> int:
    """How many ranks train copies of the model together: those of its wrapper's group, else of the default group."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(getattr(model, "process_group", None))


def average(values: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """Mean of compact gradients over those ranks, in one collective of their size."""
    flat = _flatten_dense_tensors(tuple(values))
    dist.all_reduce(flat, group=getattr(model, "process_group", None))
    return list(_unflatten_dense_tensors(flat.div_(data_parallel_ranks(model)), tuple(values)))


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Forward and backward passes that leave the wrapper's gradient buckets alone."""
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()
