"""The cosine of every neuron with one direction in Triton; documented in :mod:`shapo_kernels.ops.column_cosine`.

The weight is read once. A program takes a strip of neurons and a part of their components; the parts' sums are written
out and added in order by a second kernel. Sums are float64: a safety probe's ranking should not hang on rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: (components, neurons) of a tile and tiles in a part, by whether neighbours in memory are neurons or components.
NEURONS_SIDE_BY_SIDE = {"TILE_C": 8, "TILE_N": 256, "STEPS": 16}
COMPONENTS_SIDE_BY_SIDE = {"TILE_C": 256, "TILE_N": 4, "STEPS": 8}
FINISH = 128
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
CHUNK = 256


@triton.jit(
    do_not_specialize=["neurons", "components", "neuron_stride", "component_stride", "direction_stride"],
    do_not_specialize_on_alignment=["direction", "dots", "squares"],
)
def sum_kernel(
    weight,
    direction,
    dots,
    squares,
    neurons,
    components,
    neuron_stride,
    component_stride,
    direction_stride,
    BESIDE: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_N: tl.constexpr,
    STEPS: tl.constexpr,
):
    """dots[part, n], squares[part, n] = sums over the part's components of neuron n.

    ``BESIDE``: the neurons (1) or the components (2) lie side by side in rows that are multiples of 16 elements; 0: any
    strides.
    """
    if BESIDE == 1:
        neuron_stride = 1
        neurons, component_stride = neurons // 16 * 16, component_stride // 16 * 16
    elif BESIDE == 2:
        component_stride = 1
        components, neuron_stride = components // 16 * 16, neuron_stride // 16 * 16
    part = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    dot = tl.zeros([TILE_C, TILE_N], tl.float64)
    square = tl.zeros([TILE_C, TILE_N], tl.float64)
    for step in range(STEPS):
        c = (part * STEPS + step) * TILE_C + tl.arange(0, TILE_C)
        there = (c < components)[:, None] & (n < neurons)[None, :]
        w = tl.load(weight + c[:, None] * component_stride + n[None, :] * neuron_stride, mask=there, other=0.0)
        v = tl.load(direction + c * direction_stride, mask=c < components, other=0.0).to(tl.float64)
        wide = w.to(tl.float32).to(tl.float64) if w.dtype != tl.float64 else w
        dot += wide * v[:, None]
        square += wide * wide
    at = part * neurons + n
    tl.store(dots + at, tl.sum(dot, 0), mask=n < neurons)
    tl.store(squares + at, tl.sum(square, 0), mask=n < neurons)


@triton.jit(
    do_not_specialize=["neurons", "components", "direction_stride", "parts"],
    do_not_specialize_on_alignment=["direction", "dots", "squares"],
)
def finish_kernel(
    direction,
    dots,
    squares,
    cosines,
    neurons,
    components,
    direction_stride,
    parts,
    FINISH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """cosines[n] = <W_n, v> / (||W_n|| ||v||), 0 where a norm is zero."""
    lanes = tl.arange(0, CHUNK).to(tl.int64)
    v_squares = tl.zeros([CHUNK], tl.float64)
    for start in range(0, components, CHUNK):
        c = start + lanes
        v = tl.load(direction + c * direction_stride, mask=c < components, other=0.0).to(tl.float64)
        v_squares += v * v
    n = tl.program_id(0).to(tl.int64) * FINISH + tl.arange(0, FINISH)
    there = n < neurons
    dot = tl.zeros([FINISH], tl.float64)
    square = tl.zeros([FINISH], tl.float64)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * neurons + n
        dot += tl.load(dots + at, mask=there, other=0.0)
        square += tl.load(squares + at, mask=there, other=0.0)
    norms = tl.sqrt(square) * tl.sqrt(tl.sum(v_squares, 0))
    cosine = tl.where(norms == 0.0, 0.0, dot / tl.where(norms == 0.0, 1.0, norms))
    tl.store(cosines + n, cosine.to(cosines.dtype.element_ty), mask=there)


def column_cosine(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    neurons, components = weight.shape[axis], weight.shape[1 - axis]
    config = configuration(weight, axis)
    parts = max(1, triton.cdiv(components, config["TILE_C"] * config["STEPS"]))
    with torch.cuda.device_of(weight):
        result = torch.float64 if weight.dtype == torch.float64 else torch.float32
        cosines = torch.empty(neurons, dtype=result, device=weight.device)
        if not neurons:
            return cosines
        dots = torch.empty(2, parts, neurons, dtype=torch.float64, device=weight.device)
        sum_kernel[(triton.cdiv(neurons, config["TILE_N"]), parts)](
            weight,
            direction,
            dots[0],
            dots[1],
            neurons,
            components,
            weight.stride(axis),
            weight.stride(1 - axis),
            direction.stride(0),
            **config,
            **OPTIONS,
        )
        finish_kernel[(triton.cdiv(neurons, FINISH),)](
            direction,
            dots[0],
            dots[1],
            cosines,
            neurons,
            components,
            direction.stride(0),
            parts,
            FINISH=FINISH,
            CHUNK=CHUNK,
            **OPTIONS,
        )
    return cosines


def configuration(weight: Tensor, axis: int) -> dict[str, int]:
    """A tile that lies along the memory, whichever way the weight is stored."""
    along, across = weight.stride(axis), weight.stride(1 - axis)
    if along != 1 and across == 1:
        return {**COMPONENTS_SIDE_BY_SIDE, "BESIDE": 2 if _in_rows_of_16(weight, 1 - axis) else 0}
    return {**NEURONS_SIDE_BY_SIDE, "BESIDE": 1 if along == 1 and _in_rows_of_16(weight, axis) else 0}


def _in_rows_of_16(weight: Tensor, beside: int) -> bool:
    """Whether rows along dimension ``beside`` begin on 16 bytes and are multiples of 16 elements."""
    return weight.data_ptr() % 16 == 0 and weight.stride(1 - beside) % 16 == 0 and weight.shape[beside] % 16 == 0
