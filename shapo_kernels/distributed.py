"""Agreement between ranks: every rank moves along the same direction, that of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn


def data_parallel_ranks(model: nn.Module) -> int:
    """How many ranks train copies of the model together: those of its wrapper's group, else of the default group."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(getattr(model, "process_group", None))


def average(values: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """Mean of compact gradients over those ranks, in one collective of their size."""
    ranks = data_parallel_ranks(model)
    flat = torch.cat([value.flatten() for value in values])
    dist.all_reduce(flat, group=getattr(model, "process_group", None))
    means = flat.div_(ranks).split([value.numel() for value in values])
    return [mean.view_as(value).to(value.dtype) for mean, value in zip(means, values, strict=True)]


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Forward and backward passes that leave the wrapper's gradient buckets alone."""
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return no_sync()
