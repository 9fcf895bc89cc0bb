"""Finds how each weight of a model lies over ranks: DTensors, FSDP, ZeRO, DDP."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UnsupportedLayout
from . import deepspeed, fsdp
from .sharding import Block, Layout, Run, ranks_are_known
from .torch_private import hidden_by_ddp, is_dtensor


class Layouts:
    """The layouts of a model's weights.

    Args:
        model: wrapped or not.
        sync: whether directions are averaged over data-parallel ranks.

    Raises:
        UnsupportedLayout: an engine that hides the weights, or DeepSpeed where it is not supported.
    """

    def __init__(self, model: nn.Module, sync: bool = True) -> None:
        check_supported(model)
        fsdp.reshard(model)
        self._model, self._sync = model, sync
        self._meshes: dict[int, Any] = dict(fsdp.meshes(model))
        self._runs: dict[int, Run] = dict(deepspeed.runs(model) if deepspeed.is_engine(model) else fsdp.runs(model))

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of the whole weight."""
        run = self._runs.get(id(parameter))
        return run.shape if run else tuple(parameter.shape)

    def of(self, parameter: Tensor) -> Layout:
        """The layout of one weight.

        Raises:
            UnsupportedLayout: it cannot be read.
        """
        if hidden_by_ddp(parameter):
            raise UnsupportedLayout(
                "DistributedDataParallel(device_mesh=…) hides its tensor-parallel layout: use fully_shard instead"
            )
        if (run := self._runs.get(id(parameter))) is not None:
            return run.layout(averaged=self._sync)
        if is_dtensor(parameter):
            return self._of_dtensor(parameter)
        whole = Block.whole(tuple(parameter.shape))
        return Layout(whole.size, whole, whole, averaged_over=self._data_groups(parameter))

    def _of_dtensor(self, parameter: Any) -> Layout:
        mesh, placements = parameter.device_mesh, parameter.placements
        if any(not hasattr(placement, "dim") and not placement.is_replicate() for placement in placements):
            raise UnsupportedLayout(f"it is sharded as {placements}: only Shard and Replicate are supported")
        shape, coordinate = tuple(parameter.shape), mesh.get_coordinate()
        if coordinate is None:
            raise UnsupportedLayout(f"rank {dist.get_rank()} is not part of its mesh {mesh}")
        managed_by = self._meshes.get(id(parameter))
        # fully_shard puts its own mesh's dimensions before those that the weight had, and splits what those left.
        data = range(0 if managed_by is None else managed_by.ndim)
        tensor = range(len(data), mesh.ndim)
        parts = [(placements[d], mesh.size(d), coordinate[d]) for d in range(mesh.ndim)]
        computed = Block.whole(shape).sharded([parts[d] for d in tensor])
        held = computed.sharded([parts[d] for d in data])
        if math.prod(held.size) != parameter.to_local().numel():
            raise UnsupportedLayout(
                f"it is sharded as {placements}, and its part is not the {list(held.size)} expected"
            )
        split = [d for d in range(mesh.ndim) if mesh.size(d) > 1 and not placements[d].is_replicate()]
        return Layout(
            shape,
            held,
            computed,
            held_over=tuple(mesh.get_group(d) for d in split),
            computed_over=tuple(mesh.get_group(d) for d in split if d in tensor),
            averaged_over=self._data_groups(parameter),
            gathered=managed_by is not None,
        )

    def _data_groups(self, parameter: Tensor) -> tuple[Any, ...]:
        """The groups to average over: those of the weight's own engine, else of the engine around it."""
        if not self._sync or not ranks_are_known():
            return ()
        mesh = self._meshes.get(id(parameter), next(iter(self._meshes.values()), None))
        groups: Iterable[Any]
        if mesh is not None:
            groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        elif deepspeed.is_engine(self._model):
            groups = [cast(Any, self._model).seq_data_parallel_group]
        elif self._runs:
            groups = next(iter(self._runs.values())).data
        elif (
            ddp := next((m for m in self._model.modules() if isinstance(m, DistributedDataParallel)), None)
        ) is not None:
            groups = [ddp.process_group]
        else:
            groups = self._without_engine()
        return tuple(group for group in groups if dist.get_world_size(group) > 1)

    def _without_engine(self) -> list[Any]:
        meshes = {cast(Any, p).device_mesh for p in self._model.parameters() if is_dtensor(p)}
        if not meshes:
            return [dist.group.WORLD]
        ranks = max(mesh.size() for mesh in meshes)
        if ranks == dist.get_world_size():
            return []
        raise UnsupportedLayout(
            f"its tensor-parallel mesh has {ranks} of {dist.get_world_size()} ranks, and nothing says which of the "
            "others see other data: wrap the model with fully_shard on the data-parallel mesh, or pass sync=False"
        )


def check_supported(model: nn.Module) -> None:
    """Raises UnsupportedLayout where an engine has the model's parameters in a way that is not supported."""
    if (reason := deepspeed.why_not(model)) is not None:
        raise UnsupportedLayout(reason)


def lasting_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, whether or not an engine has it gathered at this moment."""
    return deepspeed.whole_shape(parameter)
