"""What delta adds to a layer, and the gradient of some of its neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import SECTOR, Bench, agrees, served_by


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
                f"shapo_kernels, {backend}": served_by(backend, operator, arguments) for backend in bench.backends
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
                    n: (run, (lambda: None) if n.startswith("the ") else agrees(run, truth, dtype))
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
