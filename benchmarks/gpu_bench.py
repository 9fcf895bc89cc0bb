"""The timings of gpu.py: subspace update, neuron update and gradient, delta in a model, column cosine.

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
from gpu_logps import linear_sequence_logps, sequence_logps
from gpu_model import delta_forward
from rows import ratios, row
from torch import Tensor

from shapo_kernels import backends, ops

RHO = 0.05
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


class Update:
    """Gradients and weights of down-projections, and the ways to perturb some of their neurons and to restore them."""

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        self.layers, hidden, intermediate = (2, 24, 640) if bench.small else (28, 3072, 8192)
        self.bench, self.device, self.dtype = bench, bench.device, dtype
        generator = torch.Generator(bench.device).manual_seed(0)
        make = lambda: torch.randn(hidden, intermediate, generator=generator, device=bench.device)  # noqa: E731
        self.weights = [make().mul_(0.02).to(dtype) for _ in range(self.layers)]
        self.gradients = [make().to(dtype) for _ in range(self.layers)]
        count = max(1, intermediate // 100)
        order = [torch.randperm(intermediate, generator=generator, device=bench.device) for _ in self.weights]
        self.indices = [o[:count].sort().values for o in order]
        self.axes = [1] * self.layers
        self.rho = torch.full((self.layers,), RHO, dtype=torch.float64, device=bench.device)
        self.masks = [torch.zeros(intermediate, dtype=dtype, device=bench.device) for _ in self.weights]
        for mask, index in zip(self.masks, self.indices, strict=True):
            mask[index] = 1
        self.original = [w.clone() for w in self.weights]

    def sector_bytes(self) -> int:
        """The gradient's sectors are read, the weights' read and written by perturbing and by restoring: five times."""
        size = torch.tensor([], dtype=self.dtype).element_size()
        sectors = sum(torch.unique(i * size // SECTOR).numel() for i in self.indices)
        return 5 * SECTOR * sectors * self.weights[0].shape[0]

    def kernels(self, backend: str) -> Callable[[], None]:
        def perturb() -> None:
            values, squares = ops.gather(self.gradients, self.indices, self.axes)
            scale = ops.perturbation_scale(squares, self.rho)
            self.backups = [torch.empty_like(v, dtype=self.dtype) for v in values]
            ops.perturb_(self.weights, self.indices, self.axes, values, scale, self.backups)

        def restore() -> None:
            ops.restore_(self.weights, self.indices, self.axes, self.backups)

        return self._both(perturb, restore, backend)

    def indexed(self) -> Callable[[], None]:
        def perturb() -> None:
            values = [g.index_select(1, i).float() for g, i in zip(self.gradients, self.indices, strict=True)]
            scale = RHO / torch.stack([v.norm() for v in values]).norm()
            self.backups = [w.index_select(1, i) for w, i in zip(self.weights, self.indices, strict=True)]
            for weight, index, value, old in zip(self.weights, self.indices, values, self.backups, strict=True):
                weight.index_copy_(1, index, (old + scale * value).to(self.dtype))

        def restore() -> None:
            for weight, index, old in zip(self.weights, self.indices, self.backups, strict=True):
                weight.index_copy_(1, index, old)

        return self._both(perturb, restore)

    def dense(self) -> Callable[[], None]:
        return self._both(self._dense_perturb, self._dense_restore)

    def dense_compiled(self) -> Callable[[], None]:
        return self._both(self.bench.compile(self._dense_perturb), self.bench.compile(self._dense_restore))

    def _dense_perturb(self) -> None:
        self.eps = [g * m for g, m in zip(self.gradients, self.masks, strict=True)]
        norm = torch.stack([e.norm(dtype=torch.float32) for e in self.eps]).norm()
        for weight, eps in zip(self.weights, self.eps, strict=True):
            weight.add_(eps.mul_((RHO / norm).to(eps.dtype)))

    def _dense_restore(self) -> None:
        for weight, eps in zip(self.weights, self.eps, strict=True):
            weight.sub_(eps)

    def foreach(self) -> Callable[[], None]:
        def perturb() -> None:
            self.eps = list(torch._foreach_mul(self.gradients, self.masks))
            norm = torch.stack(torch._foreach_norm(self.eps, dtype=torch.float32)).norm()
            torch._foreach_mul_(self.eps, (RHO / norm).to(self.dtype))
            torch._foreach_add_(self.weights, self.eps)

        return self._both(perturb, lambda: torch._foreach_sub_(self.weights, self.eps))

    def through_the_host(self) -> Callable[[], None]:
        """What the published code does: masked float32 gradients go to host memory layer by layer, and come back."""

        def perturb() -> None:
            masked = [(g.float() * m).cpu() for g, m in zip(self.gradients, self.masks, strict=True)]
            norm = torch.stack([m.norm() for m in masked]).norm()
            self.moved = [m.mul_(RHO / norm) for m in masked]
            for weight, moved in zip(self.weights, self.moved, strict=True):
                weight.add_(moved.to(self.device, self.dtype))

        def restore() -> None:
            for weight, moved in zip(self.weights, self.moved, strict=True):
                weight.sub_(moved.to(self.device, self.dtype))

        return self._both(perturb, restore)

    def _both(
        self, perturb: Callable[[], Any], restore: Callable[[], Any], backend: str | None = None
    ) -> Callable[[], None]:
        def update() -> None:
            with backends.use(backend or "reference"):
                perturb()
                self.perturbed = [w[:, i] for w, i in zip(self.weights, self.indices, strict=True)] if self.keep else []
                restore()

        return update

    keep = False

    def check(self, update: Callable[[], None], *, exact: bool) -> Callable[[], None]:
        """The perturbed weights are float64's to the dtype's precision, the restored ones the old ones if ``exact``."""

        def check() -> None:
            self.keep = True
            try:
                update()
            finally:
                self.keep = False
            chosen = [g[:, i].double() for g, i in zip(self.gradients, self.indices, strict=True)]
            scale = RHO / torch.stack([c.norm() for c in chosen]).norm()
            unit = torch.finfo(self.dtype).eps
            for number, got in enumerate(self.perturbed):
                old = self.original[number][:, self.indices[number]].double()
                truth = old + scale * chosen[number]
                bound = unit * (truth.abs() + (scale * chosen[number]).abs() * 4)
                if not bool(((got.double() - truth).abs() <= bound).all()):
                    raise AssertionError(f"layer {number} is not at theta + eps")
            for weight, old in zip(self.weights, self.original, strict=True):
                if exact and not torch.equal(weight, old):
                    raise AssertionError("the weights were not restored to the bit")
                weight.copy_(old)

        return check


def subspace_update(bench: Bench) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        problem = Update(bench, dtype)
        ways = {f"shapo_kernels, {name}": (problem.kernels(name), True) for name in bench.backends}
        ours = next(iter(ways))
        ways |= {
            "index_select": (problem.indexed(), True),
            "dense": (problem.dense(), False),
            "dense, foreach": (problem.foreach(), False),
            "dense, compiled": (problem.dense_compiled(), False),
            "through the host": (problem.through_the_host(), False),
        }
        shape = [problem.layers, *problem.weights[0].shape]
        bench.compare(
            "gpu_subspace_update",
            f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}, 1 % of columns",
            {name: (update, problem.check(update, exact=exact)) for name, (update, exact) in ways.items()},
            ours,
            dtype=str(dtype).removeprefix("torch."),
            shape=shape,
            bytes=problem.sector_bytes(),
        )
        del problem


def neuron_operators(bench: Bench) -> None:
    tokens, hidden, intermediate = (64, 48, 640) if bench.small else (4096, 3072, 8192)
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator(bench.device).manual_seed(0)
        make = lambda *shape: torch.randn(shape, generator=generator, device=bench.device).to(dtype)  # noqa: B023, E731
        y, x = make(tokens, hidden), make(tokens, intermediate)
        weight = make(hidden, intermediate)
        neurons = max(1, intermediate // 100)
        order = torch.randperm(intermediate, generator=generator, device=bench.device)
        index, direction = order[:neurons].sort().values, make(hidden, neurons)
        chosen = x.index_select(1, index)
        size = y.element_size()
        sectors = tokens * torch.unique(index * size // SECTOR).numel() * SECTOR
        columns = {"dtype": str(dtype).removeprefix("torch."), "shape": [tokens, hidden, neurons]}

        def update() -> Tensor:
            return torch.addmm(y, x.index_select(1, index), direction.t())  # noqa: B023

        def gradient() -> Tensor:
            return y.t() @ x.index_select(1, index)  # noqa: B023

        def selected_gradient() -> Tensor:
            return y.t() @ chosen  # noqa: B023

        cases: list[tuple[str, Callable[[], Tensor], str, tuple[Any, ...], Tensor, int]] = [
            (
                "update", update, "neuron_update", (y, x, direction, index),
                y.double() + chosen.double() @ direction.double().t(),
                2 * y.nbytes + sectors + direction.nbytes,
            ),
            (
                "gradient", gradient, "neuron_gradient", (y, x, index), y.double().t() @ chosen.double(),
                y.nbytes + sectors + 4 * hidden * neurons,
            ),
            (
                "gradient, features gathered before", selected_gradient, "neuron_gradient", (y, chosen, None),
                y.double().t() @ chosen.double(), y.nbytes + chosen.nbytes + 4 * hidden * neurons,
            ),
        ]  # fmt: skip
        for name, eager, operator, arguments, truth, moved in cases:
            ways: dict[str, Callable[[], Tensor]] = {
                f"shapo_kernels, {backend}": _served_by(backend, operator, arguments) for backend in bench.backends
            }
            ours = next(iter(ways))
            ways |= {"eager": eager, "compiled": bench.compile(eager)}
            if name == "update":
                # What a delta forward adds is measured against these: the layer, and the matrix products of its block.
                ways["the layer itself"] = lambda: torch.nn.functional.linear(x, weight)  # noqa: B023
                ways["the block's products"] = lambda: _block(y, x, weight)  # noqa: B023
            bench.compare(
                "gpu_neurons",
                f"{name}, {tokens} tokens, {hidden} x {neurons} of {intermediate}, {columns['dtype']}",
                {
                    n: (run, (lambda: None) if n.startswith("the ") else _agrees(run, truth, dtype))
                    for n, run in ways.items()
                },
                ours,
                bytes=moved,
                **columns,
            )


def _block(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The products of a Llama block with grouped queries: query, key and value, output; gate, up and down."""
    hidden = y.shape[-1]
    for width in (hidden, 2 * hidden // 3, hidden):
        y @ weight[:, :width]
    for _ in range(2):
        y @ weight
    return torch.nn.functional.linear(x, weight)


def _served_by(backend: str, operator: str, arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    with backends.use(backend):
        function = backends.function(arguments[0].device, operator)
    return lambda: function(*arguments)


def _agrees(run: Callable[[], Tensor], truth: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def check() -> None:
        error = (run().double() - truth).abs().max() / truth.abs().max()
        # TF32, where a user has allowed it, has ten bits.
        bound = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2**-9
        if not bool(error <= bound):
            raise AssertionError(f"relative error {error.item():.1e}, {bound:.1e} allowed")

    return check


def column_cosine(bench: Bench) -> None:
    shape = (48, 640) if bench.small else (3072, 8192)
    for dtype in (torch.bfloat16, torch.float32):
        for axis in (1, 0):
            weight = torch.randn(shape if axis else shape[::-1], device=bench.device).to(dtype)
            direction = torch.randn(shape[0], device=bench.device)
            truth = torch.nn.functional.cosine_similarity(
                weight.double(), direction.double().unsqueeze(axis), dim=1 - axis
            )

            def eager() -> Tensor:
                return torch.nn.functional.cosine_similarity(weight.float(), direction.unsqueeze(axis), dim=1 - axis)  # noqa: B023

            ways: dict[str, Callable[[], Tensor]] = {
                f"shapo_kernels, {name}": _served_by(name, "column_cosine", (weight, direction, axis))
                for name in bench.backends
            }
            ours = next(iter(ways))
            ways |= {"eager": eager, "compiled": bench.compile(eager)}
            kind = str(dtype).removeprefix("torch.")
            bench.compare(
                "gpu_column_cosine",
                f"{weight.shape[0]} x {weight.shape[1]} {kind}, axis {axis}",
                {name: (run, _agrees(run, truth, torch.float16)) for name, run in ways.items()},
                ours,
                bytes=weight.nbytes,
                dtype=kind,
                shape=list(weight.shape),
            )


SUITES: tuple[Callable[[Bench], None], ...] = (
    subspace_update,
    neuron_operators,
    delta_forward,
    sequence_logps,
    linear_sequence_logps,
    column_cosine,
)
