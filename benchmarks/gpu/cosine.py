"""The cosine of every neuron with a direction."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Case, Run, Variant, agrees, name_of
from shapo_kernels import ops

SHAPE, SMALL = (3072, 8192), (48, 640)
Pair = tuple[Tensor, Tensor]


def _cosine(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    return torch.nn.functional.cosine_similarity(weight.float(), direction.unsqueeze(axis), dim=1 - axis)


def column_cosine(bench: Bench) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for axis in (1, 0):
            _compare(bench, dtype, axis)


def _compare(bench: Bench, dtype: torch.dtype, axis: int) -> None:
    hidden, intermediate = SMALL if bench.small else SHAPE
    shape = (hidden, intermediate) if axis else (intermediate, hidden)

    def inputs(number: int) -> Pair:
        generator = torch.Generator(bench.device).manual_seed(number)
        weight = torch.randn(shape, generator=generator, device=bench.device).to(dtype)
        return weight, torch.randn(hidden, generator=generator, device=bench.device)

    def truth(pair: Pair) -> Tensor:
        return torch.nn.functional.cosine_similarity(pair[0].double(), pair[1].double().unsqueeze(axis), dim=1 - axis)

    def ours(pair: Pair) -> Run:
        return lambda: ops.column_cosine(*pair, axis=axis)

    compiled = bench.compile(_cosine)
    check = agrees(truth, 2 * torch.finfo(torch.float16).eps)
    size = dtype.itemsize * hidden * intermediate
    bench.compare(
        Case(
            "gpu_column_cosine",
            f"{shape[0]} x {shape[1]} {name_of(dtype)}, axis {axis}",
            inputs,
            size,
            [
                *bench.ours(ours, check),
                Variant("eager", lambda pair: lambda: _cosine(*pair, axis), check),
                Variant("compiled", lambda pair: lambda: compiled(*pair, axis), check, later=True),
            ],
            {"dtype": name_of(dtype), "shape": list(shape), "bytes": size},
        )
    )
