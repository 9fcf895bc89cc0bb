"""What memory-bound operators are measured against: the same rounds' copy bandwidth, cache lines, extra memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType

CACHE_LINE = 64
COPY = "copy"


class Copy:
    """A copy between buffers far larger than the caches; measured in turn with the variants under the name `COPY`."""

    def __init__(self, megabytes: int = 256) -> None:
        self._from = torch.ones(megabytes * 2**18)
        self._to = torch.zeros_like(self._from)
        self.bytes_moved = 2 * self._from.nbytes

    def __call__(self) -> None:
        self._to.copy_(self._from)

    def columns(self, seconds: list[float], copies: list[float], bytes_needed: int) -> dict[str, float]:
        """The floor, `bytes_needed` at the copy's rate, and the variant's median distance from it."""
        rates = [self.bytes_moved / copy for copy in copies]
        return {
            "bytes": bytes_needed,
            "copy_gb_per_s": statistics.median(rates) / 1e9,
            "floor_ms": 1e3 * bytes_needed / statistics.median(rates),
            "of_floor": statistics.median(s * rate / bytes_needed for s, rate in zip(seconds, rates, strict=True)),
        }


def touched_line_bytes(weight: Tensor, index: Tensor, axis: int) -> int:
    """Bytes of the cache lines that hold the selected neurons of a contiguous weight: what must at least be moved."""
    if axis == 0:
        return index.numel() * weight.stride(0) * weight.element_size()
    start = weight.data_ptr() % CACHE_LINE
    lines = torch.unique((start + index * weight.element_size()) // CACHE_LINE).numel()
    return weight.shape[0] * lines * CACHE_LINE


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """The most memory of CPU tensors that a call allocates and holds at once.

    Memory that was there before the call does not count, nor does its release. The profiler reports such a release only
    if an earlier profile saw the allocation, and by the size that it saw, so events are matched by address. Python's
    cycle collector is off during the call: when it runs is chance.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    finally:
        if was_enabled:
            gc.enable()
    held: dict[int, int] = {}
    now = peak = 0
    for _, address, size in sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree())):
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        peak = max(peak, now)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes of each allocation; of each release too, there with negative bytes."""
    for event in events:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _allocations(event.children)
