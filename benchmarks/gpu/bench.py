"""Checks, times and records variants of one computation on one device.

A variant that disagrees with float64 mathematics is recorded as refused and not timed. The others take turns. On a GPU
each is captured in a CUDA graph and timed by events. One that cannot be captured is timed by the host's clock, and its
row says so. `p50_ms` is cold: calls go round as many copies of the inputs as it takes to be four times the L2.
`warm_ms` calls on one copy again and again, and is left out where one alone is that large. A copy between large
buffers takes its turn too: floors and shares refer to it. A dry run does the same on the CPU in small shapes, where the
numbers mean nothing.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import row
from shapo_kernels import backends

COPY = "copy"
OURS = "shapo_kernels"
# What serves where nobody names a backend.
DEFAULT = "default"
# What one timing takes at least, so that launching it does not count, and how many calls it may be.
SHORTEST_S, MOST_CALLS = 2e-3, 64
Run = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    `bind` makes the call for one copy of the inputs. `check` is given those inputs and the call, and raises where
    the result is wrong. `later` variants (what has to be compiled first, backends other than the first) are timed in
    the second half of the run. `host` variants are not captured. `rounds` limits how often it is timed.
    """

    name: str
    bind: Callable[[Any], Run]
    check: Callable[[Any, Run], None]
    later: bool = False
    host: bool = False
    rounds: int | None = None

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class Case:
    """Inputs and the variants to compute with them.

    `inputs(n)` makes the n-th copy. `held` is the bytes that one call reads and writes at least once, by which
    copies are counted. `columns` go into every row; `bytes` among them is the floor. `against` names a variant
    that the others are multiples of in `ratio_to_plain`; as ours it is timed in both halves of the run.
    """

    suite: str
    name: str
    inputs: Callable[[int], Any]
    held: int
    variants: Sequence[Variant]
    columns: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None


class Bench:
    """A device, the backends to be timed on it, and where rows go.

    `half`: "first" leaves out what comes later, "second" the rest but for ours, "both" nothing.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        small: bool,
        rounds: int,
        deadline: float = float("inf"),
        backends: Sequence[str] = (),
        half: str = "both",
        record: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        self.device, self.small, self.rounds, self.deadline, self.half = device, small, rounds, deadline, half
        self.backends, self.rows = list(backends), []
        self._record = record
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 14
        self._source = torch.ones(2**16 if small else 2**28, device=device)
        self._target = torch.empty_like(self._source)

    rows: list[dict[str, Any]]

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def wrong(self) -> list[str]:
        """Our own variants that were refused."""
        return [
            f"{r['variant']}: {r['refused']}" for r in self.rows if "refused" in r and r["variant"].startswith(OURS)
        ]

    def ours(
        self, bind: Callable[[Any], Run], check: Callable[[Any, Run], None], suffix: str = "", *, every: bool = False
    ) -> list[Variant]:
        """A variant by the first backend to be timed, or by `every` one; those after the first come later."""
        return [
            Variant(_name_of_ours(name) + suffix, _served_by(name, bind), check, later=number > 0)
            for number, name in enumerate(self.backends[: None if every else 1])
        ]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile, without its code generator in a dry run, which would spend minutes on it."""
        return torch.compile(function, backend="eager" if self.small else "inductor")

    def put(self, found: dict[str, Any]) -> None:
        self.rows.append(found)
        self._record(found)

    def compare(self, case: Case) -> None:
        """Check, time and record a case's variants of this half of the run; ours is timed in both."""
        if self.left() < 0:
            self.put({"suite": case.suite, "case": case.name, "variant": "", "left_out": "no time was left"})
            return
        copies = 1 if case.held >= 4 * self.l2 else min(16, -(-4 * self.l2 // case.held))
        inputs = [case.inputs(number) for number in range(copies)]
        ours = next(v for v in case.variants if v.ours)
        timed: dict[str, _Timed] = {}
        for variant in case.variants:
            always = variant is ours or variant.name == case.against
            if not always and self.half == ("first" if variant.later else "second"):
                continue
            try:
                runs = [variant.bind(one) for one in inputs]
                variant.check(inputs[0], runs[0])
                timed[variant.name] = _Timed(self, runs, variant)
            except Exception as error:  # a baseline that cannot run here is no reason to time nothing
                reason = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:300]
                self.put(
                    {"suite": case.suite, "case": case.name, "variant": variant.name, "refused": reason, **case.columns}
                )
        if ours.name in timed:
            self._take_turns(case, ours, timed)

    def _take_turns(self, case: Case, ours: Variant, timed: Mapping[str, _Timed]) -> None:
        def run() -> Tensor:
            return self._target.copy_(self._source)

        copy = _Timed(self, [run], Variant(COPY, lambda _: run, lambda *_: None))
        everything = {COPY: copy, **timed}
        cold: dict[str, list[float]] = {name: [] for name in everything}
        warm: dict[str, list[float]] = {name: [] for name in everything}
        for number in range(self.rounds):
            for name, variant in everything.items():
                if variant.rounds is not None and number >= variant.rounds:
                    continue
                cold[name].append(variant.cold())
                if variant.has_warm:
                    warm[name].append(variant.warm())
            if self.left() < 0:
                break
        bandwidth = 2 * self._source.nbytes / statistics.median(cold.pop(COPY))
        for name, seconds in cold.items():
            if self.half == "second" and name in (ours.name, case.against):
                continue  # it has its row
            found = row(case.suite, case.name, name, seconds, **case.columns)
            found |= {
                "timing": timed[name].how,
                "times_ours": _ratio(seconds, cold[ours.name]),
                "extra_bytes": timed[name].extra_bytes,
                "copies": timed[name].copies,
                "copy_gb_per_s": bandwidth / 1e9,
            }
            if case.against in cold:
                found["ratio_to_plain"] = _ratio(seconds, cold[case.against])
            if warm[name]:
                found["warm_ms"] = 1e3 * statistics.median(warm[name])
            if "bytes" in case.columns:
                found["of_floor"] = statistics.median(seconds) * bandwidth / case.columns["bytes"]
                found["percent_of_copy"] = 100 / found["of_floor"]
            if "bytes_64" in case.columns:
                found["of_floor_64"] = statistics.median(seconds) * bandwidth / case.columns["bytes_64"]
            self.put(found)


class _Timed:
    """A variant that is ready to be timed: seconds of one call, over the copies (cold) or on one of them (warm)."""

    def __init__(self, bench: Bench, runs: Sequence[Run], variant: Variant) -> None:
        self.bench, self.rounds, self.copies = bench, variant.rounds, len(runs)
        self.has_warm = len(runs) > 1 and not variant.host
        on_gpu = bench.device.type == "cuda"
        if not variant.host:  # what goes through the host takes seconds
            for run in runs:
                run()
        self.extra_bytes = self._extra_bytes(runs[0]) if on_gpu else 0
        captured = on_gpu and not variant.host and not _waits(runs[0])
        rounds = 1
        if captured:
            once = self._on_host(runs) / len(runs)
            rounds = max(1, min(MOST_CALLS, round(SHORTEST_S / once)) // len(runs))
        self._cold_runs, self._warm_runs = list(runs) * rounds, [runs[0]] * (len(runs) * rounds)
        self._cold = self._warm = None
        self.how = "host"
        if captured:
            try:
                self._cold = _graph(self._cold_runs)
                self._warm = _graph(self._warm_runs) if self.has_warm else None
                self.how = "graph"
            except RuntimeError as error:
                self._cold = None
                self.how = f"host: {error}".splitlines()[0][:120]

    def cold(self) -> float:
        return self._time(self._cold, self._cold_runs)

    def warm(self) -> float:
        self._warm_runs[0]()
        return self._time(self._warm, self._warm_runs)

    def _time(self, graph: torch.cuda.CUDAGraph | None, runs: Sequence[Run]) -> float:
        if graph is None:
            return self._on_host(runs) / len(runs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # A fifth of a millisecond, in which the host queues all of this.
        torch.cuda._sleep(400_000)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(runs)

    def _on_host(self, runs: Sequence[Run]) -> float:
        wait = torch.cuda.synchronize if self.bench.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        for run in runs:
            run()
        wait()
        return time.perf_counter() - start

    def _extra_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Round by round, over the rounds that both have."""
    return statistics.median(mine / other for mine, other in zip(seconds, others, strict=False))


def _waits(run: Run) -> bool:
    """Whether a call makes the host wait for the device, which no graph can capture."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _graph(runs: Sequence[Run]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at a first call is made outside of the graph, on a stream like its own
        for run in dict.fromkeys(runs):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def using(backend: str) -> contextlib.AbstractContextManager[None]:
    """`backends.use`, but for the default, which nobody names."""
    return contextlib.nullcontext() if backend == DEFAULT else backends.use(backend)


def _name_of_ours(backend: str) -> str:
    return OURS if backend == DEFAULT else f"{OURS}, {backend}"


def _served_by(backend: str, bind: Callable[[Any], Run]) -> Callable[[Any], Run]:
    def bound(inputs: Any) -> Run:
        run = bind(inputs)

        def served() -> Any:
            with using(backend):
                return run()

        return served

    return bound


def agrees(truth: Callable[[Any], Tensor], room: float) -> Callable[[Any, Run], None]:
    """A check: the largest error, in shares of the truth's largest element."""

    def check(inputs: Any, run: Run) -> None:
        expected = truth(inputs)
        error = (run().double() - expected).abs().max() / expected.abs().max()
        if not bool(error <= room):
            raise AssertionError(f"relative error {error.item():.1e}, {room:.1e} allowed")

    return check


def any_result(inputs: Any, run: Run) -> None:
    """The check of what is timed for its price alone."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sector_bytes(index: Tensor, itemsize: int, rows: int, sector: int) -> int:
    """Bytes of the sectors that hold the selected columns of `rows` aligned rows."""
    return rows * torch.unique(index * itemsize // sector).numel() * sector
