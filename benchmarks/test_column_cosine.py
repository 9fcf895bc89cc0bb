"""The cosine of every neuron with a direction: one pass over the weight, against the two or more of eager forms.

python -m pytest benchmarks/test_column_cosine.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import COPY, Copy, peak_extra_bytes
from benchmarks.rows import interleaved, ratios, row, write
from shapo_kernels import backends, ops

ROUNDS = 15
OURS = "shapo_kernels"


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int]
    axis: int
    dtype: torch.dtype = torch.float32
    layers: int = 1  # as many as it takes to be larger than the caches: a selection reads every layer of a model once


CASES = [
    Case("3072x8192 fp32, columns", (3072, 8192), 1),
    Case("4096x14336 bf16, columns", (4096, 14336), 1, torch.bfloat16),
    Case("8192x3072 fp32, rows", (8192, 3072), 0),
    Case("12 x 3072x768 fp32, rows (GPT-2)", (3072, 768), 0, layers=12),
]


def eager(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    """The obvious form: a product for the dots, a reduction for the norms."""
    dots = direction @ weight if axis == 1 else weight @ direction
    return dots / (torch.linalg.vector_norm(weight, dim=1 - axis) * torch.linalg.vector_norm(direction))


def functional(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    """torch.nn.functional.cosine_similarity."""
    return F.cosine_similarity(weight, direction.unsqueeze(axis), dim=1 - axis)


def kernels(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    return ops.column_cosine(weight, direction, axis=axis)


VARIANTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "eager": eager,
    "cosine_similarity": functional,
    "eager, compiled": torch.compile(eager, fullgraph=True),
    OURS: kernels,
}
_rows: list[dict[str, Any]] = []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cosine(benchmark: Any, case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(case.shape, generator=generator).to(case.dtype) for _ in range(case.layers)]
    direction = torch.randn(case.shape[1 - case.axis], generator=generator).to(case.dtype)
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    errors = {}
    for name, way in VARIANTS.items():
        runs[name] = lambda way=way: [way(weight, direction, case.axis) for weight in weights]  # type: ignore[misc]
        errors[name] = max(
            error(found, weight, direction, case.axis) for found, weight in zip(runs[name](), weights, strict=True)
        )
        assert errors[name] < (1e-5 if case.dtype == torch.float32 else 5e-3), f"{name} is wrong by {errors[name]}"
    copy = Copy()
    seconds = interleaved({COPY: copy} | runs, rounds=ROUNDS)
    copies = seconds.pop(COPY)
    times_ours = ratios(seconds, OURS)
    for name, times in seconds.items():
        columns: dict[str, Any] = {
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": [case.layers, *case.shape],
            "backend": backends.serving("cpu"),
            "times_ours": times_ours[name],
            "max_error": errors[name],
            "extra_bytes": peak_extra_bytes(runs[name]),
        }
        columns |= copy.columns(times, copies, sum(weight.nbytes for weight in weights))
        _rows.append(row("column_cosine", case.name, name, times, **columns))
    write("column_cosine", _rows)
    benchmark.group = case.name
    benchmark.extra_info.update(_rows[-1] | {"times_ours": times_ours})
    benchmark.pedantic(runs[OURS], rounds=ROUNDS)


def error(cosines: Tensor, weight: Tensor, direction: Tensor, axis: int) -> float:
    w = weight.double() if axis == 1 else weight.double().t()
    truth = (direction.double() @ w) / (w.norm(dim=0) * direction.double().norm())
    return (cosines.double() - truth).abs().max().item()
