"""Agreement between ranks: every rank moves along the same direction, that of the whole batch.

Whose ranks: those of the mesh that the weights are sharded over (FSDP2, HSDP), of the wrapper's group
(``DistributedDataParallel``), else of the default group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # a torch built without distributed
    FSDPModule = ()  # type: ignore[misc, assignment]


def data_parallel_groups(model: nn.Module) -> list[Any]:
    """The process groups to reduce over one after the other; none where there is a single rank."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    sharded = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        mesh = sharded.device_mesh
        groups: list[Any] = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    else:
        groups = [getattr(model, "process_group", None)]
    return [group for group in groups if dist.get_world_size(group) > 1]


def average(values: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
    """Mean of compact gradients over the ranks of the groups: one collective of their size for each group."""
    flat = torch.cat([value.flatten() for value in values])
    for group in groups:
        dist.all_reduce(flat, group=group)
        flat.div_(dist.get_world_size(group))
    means = flat.split([value.numel() for value in values])
    return [mean.view_as(value).to(value.dtype) for mean, value in zip(means, values, strict=True)]


def without_reduction(model: nn.Module) -> AbstractContextManager[None]:
    """Forward and backward passes that leave the wrapper's gradient buckets alone."""
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
    return no_sync()


def why_unsupported(model: nn.Module, parameter: Tensor) -> str | None:
    """Why a weight's sharding cannot be seen through, or ``None`` for weights whole, and sharded by FSDP2 or HSDP."""
    if not isinstance(parameter, DTensor):
        return None
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return "it is sharded (DTensor), but not by fully_shard: tensor-parallel weights are not supported"
    shards = [placement for placement in parameter.placements if not placement.is_replicate()]
    if len(shards) != 1 or type(shards[0]) is not Shard or shards[0].dim != 0:
        return (
            f"it is sharded as {tuple(parameter.placements)}: of sharded weights only FSDP2's and HSDP's are supported"
        )
    return None


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a weight, and the number of the first of them; the weight itself where it is whole."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local().detach(), offset[0]


def sum_over_shards(sums: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Sums over each rank's rows -> sums over whole weights; those of weights held whole stay as they are."""
    sharded = [isinstance(parameter, DTensor) for parameter in parameters]
    if not any(sharded):
        return sums
    example = next(p for p in parameters if isinstance(p, DTensor))
    (dimension,) = [i for i, placement in enumerate(example.placements) if not placement.is_replicate()]
    totals = sums.clone()
    dist.all_reduce(totals, group=example.device_mesh.get_group(dimension))
    return torch.where(torch.tensor(sharded, device=sums.device), totals, sums)
