"""Checks, times and records variants of one computation on one device.

Every variant is compared with float64 mathematics first; one that disagrees is recorded as refused and not timed.
Variants are timed in turn, by CUDA events on a GPU, and a copy between large buffers is one of them: bandwidths and
floors refer to it. A dry run does the same on the CPU in small shapes, where its numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import ratios, row
from shapo_kernels import backends

SECTOR = 32
COPY = "copy"
Variants = Mapping[str, Callable[[], Any]]
Rows = list[dict[str, Any]]


class Bench:
    """A device, the backends that are to be timed on it, and the rows so far."""

    def __init__(self, device: torch.device, *, small: bool, rounds: int, deadline: float) -> None:
        self.device, self.small, self.rounds, self.deadline = device, small, rounds, deadline
        self.backends = [n for n in ("cuda", "triton", "cpu") if n in backends.available() and self._serves(n)]
        self.rows: Rows = []
        elements = 2**16 if small else 2**28
        self._source = torch.ones(elements, device=device)
        self._target = torch.empty_like(self._source)

    def _serves(self, name: str) -> bool:
        return (name == "cpu") == (self.device.type == "cpu")

    def compare(
        self,
        suite: str,
        case: str,
        variants: Mapping[str, tuple[Callable[[], Any], Callable[[], None]]],
        ours: str,
        **columns: Any,
    ) -> None:
        """Check, time and record variants: name -> (what to time, what raises where its result is wrong)."""
        usable: dict[str, Callable[[], Any]] = {}
        for name, (run, check) in variants.items():
            try:
                check()
            except Exception as error:  # a baseline that cannot run here is no reason to time nothing
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.rows.append({"suite": suite, "case": case, "variant": name, "refused": reason, **columns})
            else:
                usable[name] = run
        if ours not in usable or time.monotonic() > self.deadline:
            return
        extra = {name: self._extra_bytes(run) for name, run in usable.items()}
        seconds = self._interleaved({COPY: self._copy, **usable})
        copies = seconds.pop(COPY)
        bandwidth = 2 * self._source.nbytes / statistics.median(copies)
        times_ours = ratios(seconds, ours)
        for name, times in seconds.items():
            found = row(suite, case, name, times, **columns, extra_bytes=extra[name], times_ours=times_ours[name])
            found["copy_gb_per_s"] = bandwidth / 1e9
            if "bytes" in columns:
                found["of_floor"] = statistics.median(times) * bandwidth / columns["bytes"]
                found["percent_of_peak"] = 100 / found["of_floor"]
            self.rows.append(found)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile, without its code generator in a dry run, which would spend minutes on it."""
        return torch.compile(function, backend="eager" if self.small else "inductor")

    def _copy(self) -> None:
        self._target.copy_(self._source)

    def _interleaved(self, variants: Variants) -> dict[str, list[float]]:
        for run in variants.values():
            for _ in range(3):
                run()
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(self.rounds):
            for name, run in variants.items():
                seconds[name].append(self._time(run))
            if time.monotonic() > self.deadline:
                break
        return seconds

    def _time(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The queue is filled first, so that what is timed is the device and not the host that launches.
        torch.cuda._sleep(2_000_000)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _extra_bytes(self, run: Callable[[], Any]) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before


def served_by(backend: str, operator: str, arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    with backends.use(backend):
        function = backends.function(arguments[0].device, operator)
    return lambda: function(*arguments)


def agrees(run: Callable[[], Tensor], truth: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def check() -> None:
        error = (run().double() - truth).abs().max() / truth.abs().max()
        # TF32, where a user has allowed it, has ten bits.
        bound = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2**-9
        if not bool(error <= bound):
            raise AssertionError(f"relative error {error.item():.1e}, {bound:.1e} allowed")

    return check
