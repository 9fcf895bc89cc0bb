"""How a selected weight lies over ranks: what of it this rank holds, what it computes with, who sees other data.

One vocabulary for every engine. A weight is *held* between the passes, as a whole or in parts that add up to it over
some ranks; its layers *compute* with all of it or, under tensor parallelism, with a part; and the ascent's direction is
*averaged* over the ranks that see other data.

| engine | held | computed with |
|---|---|---|
| none, DDP | whole | whole |
| tensor parallel | rows or columns | the same |
| FSDP2, HSDP, ``replicate`` | rows | whole, gathered |
| FSDP2 with tensor parallel | rows of a tensor-parallel part | that part, gathered |
| FSDP1, ZeRO-3 | a run of the flattened weight | whole, gathered |
| ZeRO-1, ZeRO-2 | whole | whole |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .deepspeed import is_engine, why_not


class UnsupportedLayout(ValueError):
    """A weight's sharding that cannot be seen through; the message says why and what to do."""


@dataclass(frozen=True)
class Block:
    """A box of a weight: ``size`` elements from ``offset`` on, for each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def places(self, index: Tensor, axis: int) -> Tensor:
        """Those neurons of the whole weight that lie in the block, counted from its first."""
        first = self.offset[axis] if self.offset else 0
        last = first + (self.size[axis] if self.size else 1)
        return index[(index >= first) & (index < last)] - first

    def sharded(self, parts: Sequence[tuple[Any, int, int]]) -> Block:
        """One part of the block for each ``(placement, count, place)``: chunks as ``torch.chunk`` makes them."""
        offset, size = list(self.offset), list(self.size)
        for placement, count, place in parts:
            if placement.is_replicate():
                continue
            length = size[placement.dim]
            chunk = -(-length // count)
            start = min(chunk * place, length)
            offset[placement.dim] += start
            size[placement.dim] = min(chunk, length - start)
        return Block(tuple(offset), tuple(size))


@dataclass(frozen=True)
class Layout:
    """One weight over ranks.

    Args:
        shape: of the whole weight.
        held: the part that this rank holds between the passes.
        computed: the part that its layers compute with on this rank.
        held_over: process groups over which, one after the other, sums over held parts become sums over the weight.
        computed_over: the same for computed parts: the tensor-parallel groups.
        averaged_over: process groups whose ranks see other data.
        gathered: what the layers compute with is gathered for each forward pass: there is nothing to write to.
    """

    shape: tuple[int, ...]
    held: Block
    computed: Block
    held_over: tuple[Any, ...] = ()
    computed_over: tuple[Any, ...] = ()
    averaged_over: tuple[Any, ...] = ()
    gathered: bool = False

    def local(self, parameter: Tensor) -> Tensor:
        """The held part: this rank's own memory where it is a tensor of its own."""
        return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


@dataclass(frozen=True)
class RunLayout(Layout):
    """A weight held as a run of its flattened elements; ``held`` are the rows that the run touches.

    Args:
        start, count: the run's first element and its length.
    """

    start: int = 0
    count: int = 0

    def local(self, parameter: Tensor) -> Tensor:
        """A copy of the rows that the run touches, with zeros where other ranks hold them: only sums are of use."""
        # ZeRO-3 keeps a parameter's run beside it, padded and maybe on another device.
        run = getattr(parameter, "ds_tensor", parameter).detach().flatten()[: self.count].to(parameter.device)
        rows = run.new_zeros(math.prod(self.held.size))
        begin = self.start - self.held.offset[0] * math.prod(self.shape[1:])
        rows[begin : begin + run.numel()] = run
        return rows.view(self.held.size)


@dataclass
class _Run:
    """Where FSDP1 or ZeRO-3 has put a weight."""

    shape: tuple[int, ...]
    start: int
    count: int
    shards: tuple[Any, ...]
    data: tuple[Any, ...]


@dataclass
class Layouts:
    """The layouts of a model's weights.

    Args:
        model: wrapped or not.
        sync: whether directions are averaged at all.

    Raises:
        UnsupportedLayout: an engine that hides the weights altogether, or DeepSpeed where it is not supported.
    """

    model: nn.Module
    sync: bool = True
    _meshes: dict[int, Any] = field(default_factory=dict)
    _runs: dict[int, _Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_deepspeed(self.model)
        reshard(self.model)
        self._meshes = dict(_fully_sharded(self.model))
        self._runs = dict(_partitioned(self.model) if is_engine(self.model) else _flattened(self.model))

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of the whole weight."""
        run = self._runs.get(id(parameter))
        return run.shape if run else tuple(parameter.shape)

    def of(self, parameter: Tensor) -> Layout:
        """The layout of one weight.

        Raises:
            UnsupportedLayout: it cannot be seen through.
        """
        if hasattr(parameter, "_st_info"):
            raise UnsupportedLayout(
                "DistributedDataParallel(device_mesh=…) hides its tensor-parallel layout: use fully_shard instead"
            )
        if (run := self._runs.get(id(parameter))) is not None:
            return _run_layout(run, run.data if self.sync else ())
        if isinstance(parameter, DTensor):
            return self._of_dtensor(parameter)
        shape = tuple(parameter.shape)
        whole = Block((0,) * len(shape), shape)
        return Layout(shape, whole, whole, averaged_over=self._data_groups(parameter))

    def _of_dtensor(self, parameter: DTensor) -> Layout:
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
        computed = Block((0,) * len(shape), shape).sharded([parts[d] for d in tensor])
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
        if not self.sync or not ranks_are_known():
            return ()
        mesh = self._meshes.get(id(parameter), next(iter(self._meshes.values()), None))
        groups: Iterable[Any]
        if mesh is not None:
            groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        elif is_engine(self.model):
            groups = [self.model.seq_data_parallel_group]
        elif self._runs:
            groups = next(iter(self._runs.values())).data
        elif (engine := next(_of_type(self.model, DistributedDataParallel), None)) is not None:
            groups = [engine.process_group]
        else:
            groups = self._without_engine()
        return tuple(group for group in groups if dist.get_world_size(group) > 1)

    def _without_engine(self) -> list[Any]:
        meshes = {p.device_mesh for p in self.model.parameters() if isinstance(p, DTensor)}
        if not meshes:
            return [dist.group.WORLD]
        ranks = max(mesh.size() for mesh in meshes)
        if ranks == dist.get_world_size():
            return []
        raise UnsupportedLayout(
            f"its tensor-parallel mesh has {ranks} of {dist.get_world_size()} ranks, and nothing says which of the "
            "others see other data: wrap the model with fully_shard on the data-parallel mesh, or pass sync=False"
        )


def ranks_are_known() -> bool:
    return dist.is_available() and dist.is_initialized()


def refuse_deepspeed(model: nn.Module) -> None:
    """Raises UnsupportedLayout where DeepSpeed has the model's parameters and the model is not a supported engine."""
    if (reason := why_not(model)) is not None:
        raise UnsupportedLayout(reason)


def lasting_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, whether or not ZeRO-3 has it gathered at this moment."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def refuse_inner(model: nn.Module) -> None:
    """Asked after a forward pass, before which FSDP1 does not know its outermost module.

    Raises:
        UnsupportedLayout: that is around the model, and its ``no_sync`` out of reach: gradients that were there before
            an ascent would be in FSDP1's way.
    """
    units = list(_of_type(model, FullyShardedDataParallel))
    if units and not any(unit._is_root for unit in units):
        raise UnsupportedLayout(
            "the model is inside a FullyShardedDataParallel that the optimizer was not given: make it around that one"
        )


def reshard(model: nn.Module) -> None:
    """Let layers hold the parameters that are trained: fully_shard leaves gathered ones after an evaluation."""
    for module in _of_type(model, FSDPModule):
        module.reshard()


def _fully_sharded(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """id of each parameter that fully_shard (or replicate) manages, and its data-parallel mesh."""
    for module in _of_type(model, FSDPModule):
        state = module._get_fsdp_state()
        # Up to torch 2.11 a module has one group, or none.
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            for managed in group.fsdp_params if group is not None else ():
                if getattr(managed.mesh_info, "dp_mesh_dims", None) is not None:
                    raise UnsupportedLayout(
                        "fully_shard(dp_mesh_dims=…) is not supported: shard plain or tensor-parallel weights on the "
                        "data-parallel mesh"
                    )
                where = managed._module_info
                yield id(getattr(where.module, where.param_name)), managed.mesh_info.mesh


def _flattened(model: nn.Module) -> Iterator[tuple[int, _Run]]:
    """id of each parameter that FSDP1 manages, and where its piece lies."""
    for module in _of_type(model, FullyShardedDataParallel):
        handle = module._handle
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise UnsupportedLayout(
                "FullyShardedDataParallel hides the weights: pass use_orig_params=True, or use fully_shard"
            )
        if not handle.uses_sharded_strategy:
            # After a backward pass that reaches no weight it does not put its parameters back, and pass 2 finds none.
            raise UnsupportedLayout(
                "FullyShardedDataParallel with NO_SHARD, which it turns to on a single rank, is not supported: use "
                "DistributedDataParallel, or the model as it is"
            )
        flat = handle.flat_param
        between = getattr(module, "_inter_node_pg", None)
        shards = (handle.process_group,)
        data = (*shards, between) if between is not None else shards
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = (info.intra_param_start_idx or 0) if info.in_shard else 0
            yield id(parameter), _Run(tuple(shape), start, parameter.numel(), shards, data)


def _partitioned(engine: Any) -> Iterator[tuple[int, _Run]]:
    """id of each parameter that ZeRO-3 has partitioned, and where this rank's piece lies."""
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_tensor"):
            continue
        kept = parameter.ds_tensor
        start = min(parameter.ds_zero_partition_rank * kept.ds_numel, parameter.ds_numel)
        count = min(kept.ds_numel, parameter.ds_numel - start)
        if kept.numel() < count or hasattr(kept, "ds_quant_scale"):
            raise UnsupportedLayout(f"DeepSpeed keeps {name!r} quantised or on a drive: keep parameters on a device")
        shards = (parameter.ds_process_group,)
        yield id(parameter), _Run(tuple(parameter.ds_shape), start, count, shards, (engine.seq_data_parallel_group,))


def _run_layout(run: _Run, data: tuple[Any, ...]) -> Layout:
    row = math.prod(run.shape[1:])
    first = run.start // row if row else 0
    last = -(-(run.start + run.count) // row) if row and run.count else first
    held = Block((first, *(0 for _ in run.shape[1:])), (last - first, *run.shape[1:]))
    return RunLayout(
        run.shape,
        held,
        Block((0,) * len(run.shape), run.shape),
        held_over=run.shards,
        averaged_over=data,
        gathered=True,
        start=run.start,
        count=run.count,
    )


def _of_type(model: nn.Module, kind: type) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, kind))
