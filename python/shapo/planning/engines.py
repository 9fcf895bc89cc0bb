"""What an engine adds to an update: how it divides weights over ranks, what it sends, what it holds for that.

The engines as Accelerate sets them up: DDP; FSDP2 with each block, the embedding, and the last norm with the head
gathered by themselves; DeepSpeed's ZeRO-2 and ZeRO-3, nothing kept gathered between forward and backward
(`stage3_max_reuse_distance: 0`; DeepSpeed's default keeps a billion elements).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from shapo.planning.tracing import GRADIENTS, STATES, WEIGHTS
from shapo.planning.units import Unit
from shapo.planning.updates import WAYS, Update

ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")

# DeepSpeed reserves a bucket of so many elements, whatever the model (`reduce_bucket_size`).
BUCKET = 500_000_000

# qlora runs in one process.
_IMPOSSIBLE = {
    "ddp": ("qlora",),
    # What is gathered for a pass cannot be written to.
    "fsdp2": ("qlora", "in_place", "sam", "published"),
    # DeepSpeed keeps gradients to itself, and wants every block in every pass.
    "zero2": ("qlora", "sam", "published", "reuse"),
    "zero3": ("qlora", "in_place", "sam", "published", "reuse"),
}


@dataclass(frozen=True)
class Buffers:
    """Bytes that an engine holds on a rank beside its parts of the weights, gradients and states.

    Attributes:
        always: Buckets of gradients (DDP, ZeRO-3).
        in_passes: Gathered weights (FSDP2, ZeRO-3) and ZeRO-2's bucket, which are gone in the step.
    """

    always: float = 0
    in_passes: float = 0


@dataclass(frozen=True)
class Sent:
    """Bytes that cross the ranks in one update: what a rank puts into each kind of collective.

    Attributes:
        all_reduce: Of gradients, and of the ascent's direction and norms.
        all_gather: A rank's parts of weights.
        reduce_scatter: Of gradients.
    """

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def on_a_ring(self, ranks: int) -> float:
        """Bytes that each rank sends where collectives go around a ring, which is the least."""
        reduced = 2 * self.all_reduce + self.reduce_scatter
        return (reduced / ranks + self.all_gather) * (ranks - 1)


def ways_under(engine: str) -> tuple[str, ...]:
    """The ways that an engine allows."""
    return tuple(way for way in WAYS if way not in _IMPOSSIBLE.get(engine, ()))


def zero_stage(engine: str) -> int:
    """The stage of DeepSpeed's ZeRO, 0 of other engines."""
    return int(engine[4:]) if engine.startswith("zero") else 0


def shares(engine: str, ranks: int) -> dict[str, float]:
    """What a rank holds of each part that is divided over ranks."""
    part = 1 / ranks
    if engine == "fsdp2":
        return {WEIGHTS: part, STATES: part, GRADIENTS: part}
    # What ZeRO steps and its gradients are traced in the size that a rank has.
    return {WEIGHTS: part} if engine == "zero3" else {}


def peak(engine: str, ranks: int, update: Update, *, bucket: int = BUCKET) -> dict[str, float]:
    """Bytes by part at the moment when most are in use on a rank, with those of the `engine`."""
    own = buffers(engine, ranks, update, bucket=bucket)
    moments = [
        {**update.in_passes, "engine": own.always + own.in_passes},
        {**update.in_step, "engine": own.always},
    ]
    return max(moments, key=lambda moment: sum(moment.values()))


def buffers(engine: str, ranks: int, update: Update, *, bucket: int = BUCKET) -> Buffers:
    """What an engine holds for its work.

    Args:
        bucket: Elements of DeepSpeed's `reduce_bucket_size`.
    """
    size = update.itemsize
    trained = size * sum(_elements(unit.trained) for unit in update.units)
    if engine == "ddp":
        return Buffers(always=trained)
    if engine == "zero2":
        return Buffers(in_passes=bucket * size)
    whole = {role: [size * _elements(u.shapes) for u in update.units if u.role == role] for role in _ROLES}
    blocks = sorted(whole["block"], reverse=True)
    outside = max(sum(whole["tail"]), sum(whole["embedding"]))
    if engine == "fsdp2":
        # Two blocks, the next being gathered meanwhile, and what is outside of them; a unit's gradient and the copy of
        # it that is sent.
        return Buffers(in_passes=sum(blocks[:2]) + outside + 2 * max([*blocks[:1], outside]))
    return Buffers(bucket * size, outside + sum(blocks[:1])) if engine == "zero3" else Buffers()


def sent(engine: str, ranks: int, update: Update) -> Sent:
    """What one rank puts into collectives in one update, but for single numbers (the clipped norm, overflow flags)."""
    if engine == "single" or ranks == 1:
        return Sent()
    times, size, units = update.micro_batches, update.itemsize, update.units
    selective = update.way in ("in_place", "delta", "reuse", "sam")
    direction = update.direction if selective else 0
    gradients = size * sum(_elements(unit.trained) for unit in units)
    if engine == "ddp":
        passes = 2 if update.way == "published" else 1
        return Sent(all_reduce=passes * gradients + direction)
    if engine == "zero2":
        trained = sum(_elements(unit.trained) for unit in units)
        return Sent(all_reduce=times * gradients + direction, all_gather=size * 2 * -(-trained // (2 * ranks)))
    if direction:
        direction += 8 * update.targets  # the squared norm of each selected weight, whose parts lie on the ranks
    if engine == "zero3":
        part = [size * sum(-(-math.prod(shape) // ranks) for shape in unit.shapes) for unit in units]
        gathers = 2 * sum(part)
        if selective:
            gathers += sum(part) + sum(_above(units, part, update.lowest))
        scattered = size * ranks * sum(-(-math.prod(shape) // ranks) for unit in units for shape in unit.trained)
        return Sent(direction, times * gathers, times * scattered)
    part = [size * sum(_rows(shape, ranks) for shape in unit.shapes) for unit in units]
    gathers = _gathered(units, part)
    if selective:
        gathers += _gathered(units, part, lowest=update.lowest)
    if update.way == "reuse":
        gathers -= sum(_blocks(units, part)[: update.lowest])  # called once
    scattered = size * ranks * sum(_rows(shape, ranks) for unit in units for shape in unit.trained)
    return Sent(direction, times * gathers, times * scattered)


_ROLES = ("embedding", "block", "tail", "rest")


def _gathered(units: tuple[Unit, ...], part: list[int], lowest: int = 0) -> int:
    """What FSDP2 gathers in a forward pass and a backward pass that ends in the block `lowest`.

    The tail stays from one to the other. The backward pass gathers one unit ahead.
    """
    blocks = _blocks(units, part)
    backward = sum(blocks[max(0, lowest - 1) :])
    if lowest == 0:
        backward += sum(size for unit, size in zip(units, part, strict=True) if unit.role == "embedding")
    return sum(part) + backward


def _blocks(units: tuple[Unit, ...], part: list[int]) -> list[int]:
    return [size for unit, size in zip(units, part, strict=True) if unit.role == "block"]


def _above(units: tuple[Unit, ...], part: list[int], lowest: int) -> Iterable[int]:
    """Parts of the units above the block `lowest`: what a gradient passes on its way to that block's output."""
    yield from _blocks(units, part)[lowest + 1 :]
    yield from (size for unit, size in zip(units, part, strict=True) if unit.role == "tail")


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _rows(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of a rank's rows, the last ones filled up."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


__all__ = ["BUCKET", "ENGINES", "Buffers", "Sent", "buffers", "peak", "sent", "shares", "ways_under", "zero_stage"]
