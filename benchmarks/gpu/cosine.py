"""The cosine of every neuron with a direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, agrees, served_by


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
                f"shapo_kernels, {name}": served_by(name, "column_cosine", (weight, direction, axis))
                for name in bench.backends
            }
            ours = next(iter(ways))
            ways |= {"eager": eager, "compiled": bench.compile(eager)}
            kind = str(dtype).removeprefix("torch.")
            bench.compare(
                "gpu_column_cosine",
                f"{weight.shape[0]} x {weight.shape[1]} {kind}, axis {axis}",
                {name: (run, agrees(run, truth, torch.float16)) for name, run in ways.items()},
                ours,
                bytes=weight.nbytes,
                dtype=kind,
                shape=list(weight.shape),
            )
