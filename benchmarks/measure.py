"""What memory-bound operators are measured against: the same rounds' copy bandwidth, cache lines, extra memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

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
    """The most memory that a call holds in CPU tensors at once, beyond what was held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
