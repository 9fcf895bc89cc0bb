"""Norm, perturb and restore of all layers in one update, against the ways to do it without kernels of one's own.

    pytest benchmarks/test_subspace_update.py

The floor is the time that the touched cache lines need at the copy bandwidth of the same rounds: the gradient's lines
are read once, the weights' read and written once to perturb and once to restore. Correctness first: a variant that does
not give the weights of float64 mathematics, or does not give them back, is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import COPY, Copy, peak_extra_bytes, touched_line_bytes
from benchmarks.rows import interleaved, ratios, row, write
from shapo_kernels import backends, ops

RHO, ROUNDS = 0.05, 15
OURS = "shapo_kernels"


@dataclass(frozen=True)
class Case:
    name: str
    layers: int
    shape: tuple[int, int]
    axis: int
    percent: float
    dtype: torch.dtype = torch.float32


CASES = [
    Case("28 x 3072x2048 fp32, 1 % of columns", 28, (3072, 2048), 1, 1),
    Case("28 x 3072x2048 bf16, 1 % of columns", 28, (3072, 2048), 1, 1, torch.bfloat16),
    Case("28 x 3072x2048 fp32, 10 % of columns", 28, (3072, 2048), 1, 10),
    Case("12 x 3072x768 fp32, 1 % of rows (GPT-2)", 12, (3072, 768), 0, 1),
    Case("12 x 3072x768 fp32, every row", 12, (3072, 768), 0, 100),
]


@dataclass
class Problem:
    case: Case
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        case, generator = self.case, torch.Generator().manual_seed(0)
        neurons = case.shape[case.axis]
        for _ in range(case.layers):
            self.weights.append(torch.randn(case.shape, generator=generator).mul_(0.02).to(case.dtype))
            self.gradients.append(torch.randn(case.shape, generator=generator).to(case.dtype))
            chosen = torch.randperm(neurons, generator=generator)[: max(1, round(neurons * case.percent / 100))]
            self.indices.append(chosen.sort().values)
        self.axes = [case.axis] * case.layers
        self.masks = []
        for weight, index in zip(self.weights, self.indices, strict=True):
            mask = torch.zeros(weight.shape[case.axis], dtype=case.dtype)
            mask[index] = 1
            self.masks.append(mask if case.axis == 1 else mask[:, None])

    def selected_elements(self) -> int:
        return sum(i.numel() * w.shape[1 - self.case.axis] for w, i in zip(self.weights, self.indices, strict=True))

    def floor_bytes(self) -> int:
        lines = zip(self.weights, self.indices, self.axes, strict=True)
        return 5 * sum(touched_line_bytes(w, i, a) for w, i, a in lines)


class SparseSam:
    """Clone, mask, multiply, add, subtract: how a SAM wrapper with a dense mask of the weights' size does it."""

    exact = False

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.masks = [m.expand_as(w).contiguous() for m, w in zip(problem.masks, problem.weights, strict=True)]
        self.kept_bytes = sum(mask.nbytes for mask in self.masks)

    def perturb(self) -> None:
        layers = list(zip(self.p.weights, self.p.gradients, self.masks, strict=True))
        norm = torch.stack([(g * m).norm(dtype=torch.float32) for _, g, m in layers]).norm()
        scale = RHO / (norm + 1e-12)
        self.old = [w.clone() for w, _, _ in layers]
        self.eps = [g * m * scale.to(g.dtype) for _, g, m in layers]
        for weight, eps in zip(self.p.weights, self.eps, strict=True):
            weight.add_(eps)

    def restore(self) -> None:
        for weight, eps in zip(self.p.weights, self.eps, strict=True):
            weight.sub_(eps)
        del self.eps, self.old


class Dense:
    """The best that whole tensors allow: one copy of the gradients, a broadcast mask, everything else in place."""

    exact = False
    kept_bytes = 0

    def __init__(self, problem: Problem) -> None:
        self.p = problem

    def perturb(self) -> None:
        self.eps = [g * m for g, m in zip(self.p.gradients, self.p.masks, strict=True)]
        norm = torch.stack([e.norm(dtype=torch.float32) for e in self.eps]).norm()
        for weight, eps in zip(self.p.weights, self.eps, strict=True):
            weight.add_(eps.mul_((RHO / (norm + 1e-12)).to(eps.dtype)))

    def restore(self) -> None:
        for weight, eps in zip(self.p.weights, self.eps, strict=True):
            weight.sub_(eps)
        del self.eps


class DenseCompiled(Dense):
    """The same compiled, the norm and the scale included."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        torch._dynamo.reset()
        self._perturb = torch.compile(super().perturb, fullgraph=True)
        self._restore = torch.compile(super().restore, fullgraph=True)

    def perturb(self) -> None:
        self._perturb()

    def restore(self) -> None:
        self._restore()


class Indexed:
    """index_select, index_copy_: the compact way in plain PyTorch."""

    exact = True
    kept_bytes = 0

    def __init__(self, problem: Problem) -> None:
        self.p = problem

    def perturb(self) -> None:
        p, axis = self.p, self.p.case.axis
        values = [g.index_select(axis, i).float() for g, i in zip(p.gradients, p.indices, strict=True)]
        norm = torch.stack([v.norm() for v in values]).norm()
        scale = RHO / (norm + 1e-12)
        self.backups = [w.index_select(axis, i) for w, i in zip(p.weights, p.indices, strict=True)]
        for weight, index, value, backup in zip(p.weights, p.indices, values, self.backups, strict=True):
            weight.index_copy_(axis, index, (backup + scale * value).to(weight.dtype))

    def restore(self) -> None:
        for weight, index, backup in zip(self.p.weights, self.p.indices, self.backups, strict=True):
            weight.index_copy_(self.p.case.axis, index, backup)
        del self.backups


class IndexedForeach(Indexed):
    """The same with torch._foreach functions for all arithmetic."""

    def perturb(self) -> None:
        p, axis = self.p, self.p.case.axis
        values = [g.index_select(axis, i).float() for g, i in zip(p.gradients, p.indices, strict=True)]
        scale = RHO / (torch.stack(torch._foreach_norm(values)).norm() + 1e-12)
        self.backups = [w.index_select(axis, i) for w, i in zip(p.weights, p.indices, strict=True)]
        torch._foreach_mul_(values, scale)
        torch._foreach_add_(values, self.backups)
        for weight, index, value in zip(p.weights, p.indices, values, strict=True):
            weight.index_copy_(axis, index, value.to(weight.dtype))


class Kernels:
    """This library's operators, through their public functions; compact memory is kept, as the optimizer keeps it."""

    exact = True

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.rho = torch.full((problem.case.layers,), RHO, dtype=torch.float64)
        layers = list(zip(problem.weights, problem.indices, strict=True))
        self.values = [w.index_select(problem.case.axis, i).float() for w, i in layers]
        self.backups = [w.index_select(problem.case.axis, i) for w, i in layers]
        self.kept_bytes = sum(kept.nbytes for kept in (*self.values, *self.backups))

    def perturb(self) -> None:
        p = self.p
        _, squares = ops.gather(p.gradients, p.indices, p.axes, values=self.values)
        scale = ops.perturbation_scale(squares, self.rho)
        ops.perturb_(p.weights, p.indices, p.axes, self.values, scale, self.backups)

    def restore(self) -> None:
        ops.restore_(self.p.weights, self.p.indices, self.p.axes, self.backups)


VARIANTS: dict[str, type[Any]] = {
    "mask, clone, add, subtract": SparseSam,
    "whole tensors in place": Dense,
    "index_select, foreach": IndexedForeach,
    "whole tensors, compiled": DenseCompiled,
    "index_select": Indexed,
    OURS: Kernels,
}
_rows: list[dict[str, Any]] = []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_update(benchmark: Any, case: Case) -> None:
    problem, copy = Problem(case), Copy()
    updates: dict[str, Callable[[], None]] = {}
    kept: dict[str, int] = {}  # memory that a variant holds from update to update
    for name, way in VARIANTS.items():
        check(problem, variant := way(problem))
        updates[name] = both(variant)
        kept[name] = variant.kept_bytes
    seconds = interleaved({COPY: copy} | updates, rounds=ROUNDS)
    copies = seconds.pop(COPY)
    times_ours = ratios(seconds, OURS)
    for name, times in seconds.items():
        columns: dict[str, Any] = {
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": [case.layers, *case.shape],
            "backend": backends.serving("cpu"),
            "times_ours": times_ours[name],
            "extra_bytes": kept[name] + peak_extra_bytes(updates[name]),
            "selected_elements": problem.selected_elements(),
        }
        columns |= copy.columns(times, copies, problem.floor_bytes())
        _rows.append(row("subspace_update", case.name, name, times, **columns))
    write("subspace_update", _rows)
    benchmark.group = case.name
    benchmark.extra_info.update(_rows[-1] | {"times_ours": times_ours})
    benchmark.pedantic(updates[OURS], rounds=ROUNDS)


def both(way: Any) -> Callable[[], None]:
    def update() -> None:
        way.perturb()
        way.restore()

    return update


def check(problem: Problem, way: Any) -> None:
    """The perturbed weights are those of float64, and the restored ones the old ones; else nothing is timed."""
    axis, untouched = problem.case.axis, [w.clone() for w in problem.weights]
    chosen = [g.index_select(axis, i).double() for g, i in zip(problem.gradients, problem.indices, strict=True)]
    scale = RHO / torch.stack([c.norm() for c in chosen]).norm()
    way.perturb()
    for weight, old, index, c in zip(problem.weights, untouched, problem.indices, chosen, strict=True):
        expected = old.clone()
        expected.index_copy_(axis, index, (old.index_select(axis, index).double() + scale * c).to(old.dtype))
        torch.testing.assert_close(weight, expected, rtol=0.01, atol=1e-6)
    way.restore()
    for weight, old in zip(problem.weights, untouched, strict=True):
        if way.exact:
            assert torch.equal(weight, old), "the weights are not restored bit for bit"
        weight.copy_(old)
