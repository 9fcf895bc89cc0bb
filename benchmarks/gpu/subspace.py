"""Norm, perturb and restore of all layers, against the ways to do it without kernels of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Case, Run, Variant, name_of, sector_bytes
from shapo_kernels import ops

RHO = 0.05


@dataclass(frozen=True)
class Size:
    """Down-projections `[hidden, intermediate]` of a model, and the percentage of columns that is selected."""

    layers: int
    hidden: int
    intermediate: int
    percent: float
    dtype: torch.dtype

    @property
    def name(self) -> str:
        shape = f"{self.layers} x {self.hidden} x {self.intermediate}"
        return f"{shape} {name_of(self.dtype)}, {self.percent:g} % of columns"


SIZES = (
    Size(28, 3072, 8192, 1, torch.bfloat16),
    Size(28, 3072, 8192, 1, torch.float32),
    Size(28, 3072, 8192, 10, torch.bfloat16),
    Size(32, 4096, 14336, 100, torch.bfloat16),
)
SMALL = (Size(2, 24, 640, 1, torch.bfloat16), Size(2, 24, 640, 1, torch.float32), Size(2, 24, 64, 100, torch.bfloat16))


class Update:
    """Gradients and weights of down-projections, and the ways to perturb some of their neurons and to restore them."""

    def __init__(self, bench: Bench, size: Size, seed: int = 0) -> None:
        self.bench, self.device, self.dtype, self.size = bench, bench.device, size.dtype, size
        generator = torch.Generator(bench.device).manual_seed(seed)
        shape, layers = (size.hidden, size.intermediate), range(size.layers)
        make = lambda: torch.randn(shape, generator=generator, device=bench.device)  # noqa: E731
        self.weights = [make().mul_(0.02).to(self.dtype) for _ in layers]
        self.gradients = [make().to(self.dtype) for _ in layers]
        count = max(1, round(size.intermediate * size.percent / 100))
        order = [torch.randperm(size.intermediate, generator=generator, device=bench.device) for _ in layers]
        self.indices = [o[:count].sort().values for o in order]
        self.axes = [1] * size.layers
        self.rho = torch.full((size.layers,), RHO, dtype=torch.float64, device=bench.device)
        self.masks = [torch.zeros(size.intermediate, dtype=self.dtype, device=bench.device) for _ in layers]
        for mask, index in zip(self.masks, self.indices, strict=True):
            mask[index] = 1
        self.original = [w.clone() for w in self.weights]
        self.keep = False

    def floor(self, sector: int) -> int:
        """The gradient's sectors are read, the weights' read and written by perturbing and by restoring: five times."""
        rows, itemsize = self.size.hidden, self.dtype.itemsize
        return 5 * sum(sector_bytes(index, itemsize, rows, sector) for index in self.indices)

    def kernels(self) -> Run:
        def perturb() -> None:
            values, squares = ops.gather(self.gradients, self.indices, self.axes)
            scale = ops.perturbation_scale(squares, self.rho)
            self.backups = [torch.empty_like(v, dtype=self.dtype) for v in values]
            ops.perturb_(self.weights, self.indices, self.axes, values, scale, self.backups)

        def restore() -> None:
            ops.restore_(self.weights, self.indices, self.axes, self.backups)

        return self._both(perturb, restore)

    def indexed(self) -> Run:
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

    def dense(self) -> Run:
        return self._both(self._dense_perturb, self._dense_restore)

    def dense_compiled(self) -> Run:
        return self._both(self.bench.compile(self._dense_perturb), self.bench.compile(self._dense_restore))

    def _dense_perturb(self) -> None:
        self.eps = [g * m for g, m in zip(self.gradients, self.masks, strict=True)]
        norm = torch.stack([e.norm(dtype=torch.float32) for e in self.eps]).norm()
        for weight, eps in zip(self.weights, self.eps, strict=True):
            weight.add_(eps.mul_((RHO / norm).to(eps.dtype)))

    def _dense_restore(self) -> None:
        for weight, eps in zip(self.weights, self.eps, strict=True):
            weight.sub_(eps)

    def foreach(self) -> Run:
        def perturb() -> None:
            self.eps = list(torch._foreach_mul(self.gradients, self.masks))
            norm = torch.stack(torch._foreach_norm(self.eps, dtype=torch.float32)).norm()
            torch._foreach_mul_(self.eps, (RHO / norm).to(self.dtype))
            torch._foreach_add_(self.weights, self.eps)

        return self._both(perturb, lambda: torch._foreach_sub_(self.weights, self.eps))

    def through_the_host(self) -> Run:
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

    def _both(self, perturb: Callable[[], Any], restore: Callable[[], Any]) -> Run:
        def update() -> None:
            perturb()
            self.perturbed = [w[:, i] for w, i in zip(self.weights, self.indices, strict=True)] if self.keep else []
            restore()

        return update

    def check(self, update: Run, *, exact: bool) -> None:
        """The perturbed weights are float64's to the dtype's precision, the restored ones the old ones if `exact`."""
        for weight, old in zip(self.weights, self.original, strict=True):
            weight.copy_(old)  # variants that round on the way back have been timed on them
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
        self.perturbed = []
        for weight, old in zip(self.weights, self.original, strict=True):
            if exact and not torch.equal(weight, old):
                raise AssertionError("the weights were not restored to the bit")
            weight.copy_(old)


def exact(problem: Update, run: Run) -> None:
    problem.check(run, exact=True)


def rounded(problem: Update, run: Run) -> None:
    problem.check(run, exact=False)


def subspace_update(bench: Bench) -> None:
    for size in SMALL if bench.small else SIZES:
        problem = Update(bench, size)
        variants = [
            *bench.ours(Update.kernels, exact, every=True),
            Variant("index_select", Update.indexed, exact),
            Variant("dense, foreach", Update.foreach, rounded),
            Variant("dense", Update.dense, rounded),
        ]
        if size.percent < 100:
            variants.append(Variant("dense, compiled", Update.dense_compiled, rounded, later=True))
        bench.compare(_case(problem, variants))
        del problem


def through_the_host(bench: Bench) -> None:
    """Alone and twice: a round of it takes as long as everything else of its case."""
    size = (SMALL if bench.small else SIZES)[0]
    ours = bench.ours(Update.kernels, exact)
    way = Variant("through the host", Update.through_the_host, rounded, later=True, host=True, rounds=2)
    bench.compare(_case(Update(bench, size), [*ours, way]))


def _case(problem: Update, variants: list[Variant]) -> Case:
    size, floor = problem.size, problem.floor(32)
    columns = {
        "dtype": name_of(size.dtype),
        "shape": [size.layers, size.hidden, size.intermediate],
        "bytes": floor,
        "bytes_64": problem.floor(64),
    }
    another = lambda number: problem if number == 0 else Update(problem.bench, size, seed=number)  # noqa: E731
    return Case("gpu_subspace_update", size.name, another, floor, variants, columns)
