"""What delta adds to a layer, and the gradient of some of its neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Case, Run, Variant, agrees, any_result, name_of, sector_bytes
from shapo_kernels import ops

CASES = (  # tokens, hidden, intermediate, neurons, dtype
    (4096, 3072, 8192, 81, torch.bfloat16),
    (4096, 3072, 8192, 81, torch.float32),
    (16384, 3072, 8192, 819, torch.bfloat16),
)
SMALL = ((64, 48, 640, 6, torch.bfloat16), (64, 48, 640, 6, torch.float32))


@dataclass
class Layer:
    """A layer's output and input, and a direction on some of its neurons. `padded`: neurons in multiples of 16."""

    y: Tensor
    x: Tensor
    weight: Tensor
    index: Tensor
    direction: Tensor

    def __post_init__(self) -> None:
        self.chosen = self.x.index_select(1, self.index)
        pad = -len(self.index) % 16
        self.padded = torch.nn.functional.pad(self.chosen, (0, pad))
        self.padded_direction = torch.nn.functional.pad(self.direction, (0, pad))


def _layer(
    device: torch.device, seed: int, tokens: int, hidden: int, intermediate: int, neurons: int, dtype: torch.dtype
) -> Layer:
    generator = torch.Generator(device).manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)  # noqa: E731
    index = torch.randperm(intermediate, generator=generator, device=device)[:neurons].sort().values
    return Layer(make(tokens, hidden), make(tokens, intermediate), make(hidden, intermediate), index,
                 make(hidden, neurons))  # fmt: skip


def _updated(layer: Layer) -> Tensor:
    return layer.y.double() + layer.chosen.double() @ layer.direction.double().t()


def _gradient(layer: Layer) -> Tensor:
    return layer.y.double().t() @ layer.chosen.double()


def _gradient_of_all(layer: Layer) -> Tensor:
    return torch.nn.functional.pad(_gradient(layer), (0, layer.padded.shape[1] - len(layer.index)))


def _ours_updates(layer: Layer) -> Run:
    return lambda: ops.neuron_update(layer.y, layer.x, layer.direction, layer.index)


def _ours_gradient(layer: Layer) -> Run:
    return lambda: ops.neuron_gradient(layer.y, layer.x, layer.index)


def _ours_gradient_of_chosen(layer: Layer) -> Run:
    return lambda: ops.neuron_gradient(layer.y, layer.chosen)


def _ours_updates_in_place(layer: Layer) -> Run:
    output = layer.y.clone()  # every call adds to it
    return lambda: ops.neuron_update(output, layer.x, layer.direction, layer.index, in_place=True)


def _eager_updates(layer: Layer) -> Run:
    return lambda: torch.addmm(layer.y, layer.x.index_select(1, layer.index), layer.direction.t())


def _library_updates(layer: Layer) -> Run:
    """The product alone, of features that were gathered and padded before."""
    return lambda: torch.addmm(layer.y, layer.padded, layer.padded_direction.t())


def _eager_gradient(layer: Layer) -> Run:
    return lambda: layer.y.t() @ layer.x.index_select(1, layer.index)


def _library_gradient(layer: Layer) -> Run:
    if layer.y.dtype == torch.bfloat16 and layer.y.is_cuda:
        return lambda: torch.mm(layer.y.t(), layer.padded, out_dtype=torch.float32)
    return lambda: layer.y.t() @ layer.padded


def _the_layer(layer: Layer) -> Run:
    return lambda: torch.nn.functional.linear(layer.x, layer.weight)


def _the_block(layer: Layer) -> Run:
    """The products of a Llama block with grouped queries: query, key and value, output; gate, up and down."""
    hidden = layer.y.shape[-1]

    def block() -> Tensor:
        for width in (hidden, 2 * hidden // 3, hidden):
            layer.y @ layer.weight[:, :width]
        for _ in range(2):
            layer.y @ layer.weight
        return torch.nn.functional.linear(layer.x, layer.weight)

    return block


def neuron_operators(bench: Bench) -> None:
    for tokens, hidden, intermediate, neurons, dtype in SMALL if bench.small else CASES:
        shape = (tokens, hidden, intermediate, neurons, dtype)
        first = _layer(bench.device, 0, *shape)
        # TF32, where a user has allowed it, has ten bits.
        room = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2**-9
        updates, gradient = agrees(_updated, room), agrees(_gradient, room)
        compiled = _compiled(bench.compile(_addmm))
        products = [
            Variant("the layer itself", _the_layer, any_result),
            Variant("the block's products", _the_block, any_result),
        ]
        suite = {
            "update": (
                [
                    *bench.ours(_ours_updates_in_place, updates, ", in place"),
                    *bench.ours(_ours_updates, updates),
                    Variant("eager", _eager_updates, updates),
                    Variant("cuBLAS on gathered inputs", _library_updates, updates),
                    *products,
                    Variant("compiled", compiled, updates, later=True),
                ],
                2 * first.y.nbytes + first.direction.nbytes,
            ),
            "gradient": (
                [
                    *bench.ours(_ours_gradient, gradient),
                    Variant("eager", _eager_gradient, gradient),
                    Variant("cuBLAS on gathered inputs", _library_gradient, agrees(_gradient_of_all, room)),
                ],
                first.y.nbytes + 4 * hidden * neurons,
            ),
            "gradient, features gathered before": (
                [
                    *bench.ours(_ours_gradient_of_chosen, gradient),
                    Variant("cuBLAS on gathered inputs", _library_gradient, agrees(_gradient_of_all, room)),
                ],
                first.y.nbytes + 4 * hidden * neurons,
            ),
        }  # fmt: skip
        for name, (variants, product) in suite.items():
            gathered = "gathered" in name
            reads = [first.chosen.nbytes if gathered else sector_bytes(first.index, dtype.itemsize, tokens, s)
                     for s in (32, 64)]  # fmt: skip
            columns = {
                "dtype": name_of(dtype),
                "shape": [tokens, hidden, neurons],
                "bytes": product + reads[0],
                "bytes_64": product + reads[1],
            }
            bench.compare(
                Case(
                    "gpu_neurons",
                    f"{name}, {tokens} tokens, {hidden} x {neurons} of {intermediate}, {name_of(dtype)}",
                    lambda number: _layer(bench.device, number, *shape),  # noqa: B023
                    product + reads[0],
                    variants,
                    columns,
                )
            )


def _compiled(function: Callable[..., Tensor]) -> Callable[[Layer], Run]:
    return lambda layer: lambda: function(layer.y, layer.x, layer.direction, layer.index)


def _addmm(y: Tensor, x: Tensor, direction: Tensor, index: Tensor) -> Tensor:
    return torch.addmm(y, x.index_select(1, index), direction.t())
