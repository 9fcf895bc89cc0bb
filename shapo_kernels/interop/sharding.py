"""How a weight lies over ranks, in one vocabulary for every engine.

A weight is *held* between the passes: whole, or in parts that add up to it over some ranks. Its layers *compute* with
all of it or, under tensor parallelism, with a part. The ascent's direction is *averaged* over the ranks that see other
data. `discovery` finds out which is the case.

| engine | held | computed with |
|---|---|---|
| none, DDP | whole | whole |
| tensor parallel | rows or columns | the same |
| FSDP2, HSDP, `replicate` | rows | whole, gathered |
| FSDP2 with tensor parallel | rows of a tensor-parallel part | that part, gathered |
| FSDP1, ZeRO-3 | a run of the flattened weight | whole, gathered |
| ZeRO-1, ZeRO-2 | whole | whole |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from .torch_private import is_dtensor


@dataclass(frozen=True)
class Block:
    """A box of a weight: `size` elements from `offset` on, for each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Block:
        return cls((0,) * len(shape), shape)

    def places(self, index: Tensor, axis: int) -> Tensor:
        """The neurons of the whole weight that lie in the block, counted from the block's first."""
        first = self.offset[axis] if self.offset else 0
        last = first + (self.size[axis] if self.size else 1)
        return index[(index >= first) & (index < last)] - first

    def sharded(self, parts: Sequence[tuple[Any, int, int]]) -> Block:
        """The part of the block that is left after sharding it along each `(placement, ranks, rank)` in turn.

        Parts are those of `torch.chunk`.
        """
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
        gathered: the layers compute with a copy that is gathered for each forward pass, so nothing can be written.
    """

    shape: tuple[int, ...]
    held: Block
    computed: Block
    held_over: tuple[Any, ...] = ()
    computed_over: tuple[Any, ...] = ()
    averaged_over: tuple[Any, ...] = ()
    gathered: bool = False

    def local(self, parameter: Tensor) -> Tensor:
        """The held part, in this rank's own memory."""
        return cast(Tensor, local_part(parameter).detach())


@dataclass(frozen=True)
class RunLayout(Layout):
    """A weight held as a run of its flattened elements. `held` are the rows that the run touches.

    Args:
        start, count: the run's first element and its length.
    """

    start: int = 0
    count: int = 0

    def local(self, parameter: Tensor) -> Tensor:
        """A copy of the rows that the run touches, zero where other ranks hold them: only its sums mean anything."""
        # ZeRO-3 keeps a parameter's run beside it, padded and maybe on another device.
        run = getattr(parameter, "ds_tensor", parameter).detach().flatten()[: self.count].to(parameter.device)
        rows = run.new_zeros(math.prod(self.held.size))
        begin = self.start - self.held.offset[0] * math.prod(self.shape[1:])
        rows[begin : begin + run.numel()] = run
        return rows.view(self.held.size)


@dataclass(frozen=True)
class Run:
    """Where FSDP1 or ZeRO-3 has put a weight: a run of the flattened weight on each rank of `shards`.

    Args:
        data: process groups whose ranks see other data.
    """

    shape: tuple[int, ...]
    start: int
    count: int
    shards: tuple[Any, ...]
    data: tuple[Any, ...]

    def layout(self, *, averaged: bool) -> RunLayout:
        row = math.prod(self.shape[1:])
        first = self.start // row if row else 0
        last = -(-(self.start + self.count) // row) if row and self.count else first
        return RunLayout(
            self.shape,
            Block((first, *(0 for _ in self.shape[1:])), (last - first, *self.shape[1:])),
            Block.whole(self.shape),
            held_over=self.shards,
            averaged_over=self.data if averaged else (),
            gathered=True,
            start=self.start,
            count=self.count,
        )


def local_part(tensor: Any) -> Any:
    """What this rank holds of a DTensor; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def ranks_are_known() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()
