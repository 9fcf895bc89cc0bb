"""Collectives: sums over the parts of weights, means over data-parallel ranks. Which ranks: `interop.sharding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import ops
from .interop.torch_private import ddp_without_sink

if TYPE_CHECKING:
    from .model.targets import Target


def average(values: Sequence[Tensor], over: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """Means of compact gradients, each over the ranks of its groups: one collective for all that share a group.

    Args:
        values: one tensor for each weight, of the same shapes on all ranks that are averaged over.
        over: its groups, reduced over one after the other.
    """
    means = list(values)
    for groups in dict.fromkeys(over):
        members = [i for i, mine in enumerate(over) if mine == groups]
        if not groups:
            continue
        flat = torch.cat([values[i].flatten() for i in members])
        for group in groups:
            dist.all_reduce(flat, group=group)
            flat.div_(dist.get_world_size(group))
        for i, mean in zip(members, flat.split([values[i].numel() for i in members]), strict=True):
            means[i] = mean.view_as(values[i]).to(values[i].dtype)
    return means


def total(sums: Tensor, over: Sequence[tuple[Any, ...]]) -> Tensor:
    """Sums over each rank's parts -> sums over whole weights.

    Args:
        sums: `[n, …]`, a row for each weight.
        over: n times the groups whose ranks hold the other parts; none where the weight is whole.
    """
    for group in dict.fromkeys(group for groups in over for group in groups):
        mine = [group in groups for groups in over]
        if all(mine):
            sums = sums.clone()
            dist.all_reduce(sums, group=group)
        else:
            mask = torch.tensor(mine, device=sums.device).view(-1, *(1 for _ in sums.shape[1:]))
            parts = torch.where(mask, sums, 0)
            dist.all_reduce(parts, group=group)
            sums = torch.where(mask, parts, sums)
    return sums


def total_over_parts(sums: Tensor, targets: Sequence[Target]) -> Tensor:
    """Sums over what each rank computes with, a row for each target -> sums over whole weights (a collective)."""
    return total(sums, [target.layout.computed_over for target in targets])


def selected_weight_squared_norms(targets: Sequence[Target]) -> Tensor:
    """||W_S||^2 of each target, float64 `[n]`: of the whole weight (a collective), NaN where it is quantised."""
    known = [i for i, target in enumerate(targets) if not target.quantised]
    parts = [targets[i].held_neurons() for i in known]
    found = ops.selected_squared_norms(
        [rows for rows, _ in parts], [index for _, index in parts], [targets[i].axis for i in known]
    )
    found = total(found, [targets[i].layout.held_over for i in known])
    if len(known) == len(targets):
        return found
    squares = iter(found)
    nan = torch.full((), torch.nan, dtype=torch.float64, device=targets[0].parameter.device)
    return torch.stack([nan if target.quantised else next(squares) for target in targets])


def without_reduction(model: nn.Module, *, selective: bool) -> AbstractContextManager[None]:
    """Forward and backward passes that leave the wrapper's gradient buckets alone.

    Args:
        selective: no parameter gets a gradient.

    Raises:
        RuntimeError: the wrapper counts the gradients all the same.
    """
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        if not selective:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) takes an ascent's gradients for its first pass's: use "
                "static_graph=False, or `with opt.ascent():` and ascent='selective'"
            )
        return ddp_without_sink(model)
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return no_sync()
