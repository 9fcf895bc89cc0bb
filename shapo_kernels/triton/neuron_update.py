"""The neuron update and its gradient in Triton; documented in :mod:`shapo_kernels.ops.neuron_update`.

Both read the selected columns of the input where they lie: x[..., S] is never written. A scattered column costs a
32-byte sector for every token, so that a program gathers it once and meets as many output features as it can with it.
Sums are float32. float64, which no tensor core of this kind serves, is left to the reference.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference

# Neurons that a program holds at once; more are taken in turns.
MAX_TILE_K = 128
#: Tokens that one program of the gradient adds up; the split depends on the shapes alone, so that a sum has one order.
TOKENS_IN_PART = 512
ADD_BLOCK = 1024
ADD_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _selected(
    x, tokens, k, neurons, x_stride, index, INDEXED: tl.constexpr, UPCAST: tl.constexpr, TILE_T: tl.constexpr, DTYPE
):
    """x[t, index[k]] for the first ``tokens`` of ``TILE_T`` rows, in the dtype of the layer's output; 0 outside."""
    t = tl.arange(0, TILE_T)
    column = tl.load(index + k, mask=k < neurons, other=0).to(tl.int32) if INDEXED else k
    there = (t < tokens)[:, None] & (k < neurons)[None, :]
    value = tl.load(x + t[:, None] * x_stride + column[None, :], mask=there, other=0.0).to(DTYPE)
    return value.to(tl.float32) if UPCAST else value


@triton.jit(
    do_not_specialize=["tokens", "features", "neurons", "x_stride", "direction_stride", "groups"],
    do_not_specialize_on_alignment=["direction", "index"],
)
def update_kernel(
    result,
    output,
    x,
    direction,
    index,
    tokens,
    features,
    neurons,
    x_stride,
    direction_stride,
    groups,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """result[t, f] = output[t, f] + sum_k x[t, index[k]] direction[f, k].

    A program holds one tile of tokens and every ``groups``-th tile of output features. ``ONCE``: all neurons fit into
    one tile, which is then gathered once for all of them. ``ALIGNED``: rows are whole multiples of 16 elements.
    ``UPCAST``: for the interpreter, which must not compute in bfloat16. Positions inside a tile have 32 bits, a tile's
    own 64.
    """
    dtype = result.dtype.element_ty
    if ALIGNED:  # said in a way that the compiler takes in
        features, x_stride = features // 16 * 16, x_stride // 16 * 16
    first = tl.program_id(0).to(tl.int64) * TILE_T
    left = (tokens - first).to(tl.int32)
    output += first * features
    result += first * features
    x += first * x_stride
    t = tl.arange(0, TILE_T)
    lanes = tl.arange(0, TILE_K)
    if ONCE:
        held = _selected(x, left, lanes, neurons, x_stride, index, INDEXED, UPCAST, TILE_T, dtype)
    for tile in range(tl.program_id(1), tl.cdiv(features, TILE_F), groups):
        f = tile * TILE_F + tl.arange(0, TILE_F)
        total = tl.zeros([TILE_T, TILE_F], tl.float32)
        for start in range(0, neurons, TILE_K):
            k = start + lanes
            if not ONCE:
                held = _selected(x, left, k, neurons, x_stride, index, INDEXED, UPCAST, TILE_T, dtype)
            there = (k < neurons)[:, None] & (f < features)[None, :]
            d = tl.load(direction + f[None, :] * direction_stride + k[:, None], mask=there, other=0.0)
            d = d.to(tl.float32) if UPCAST else d
            total = tl.dot(held, d, total, input_precision=PRECISION)
        at = t[:, None] * features + f[None, :]
        there = (t < left)[:, None] & (f < features)[None, :]
        y = tl.load(output + at, mask=there, other=0.0)
        # The product is rounded to the output's dtype before it is added, as eager PyTorch does.
        total = total.to(dtype).to(tl.float32) + y.to(tl.float32)
        tl.store(result + at, total.to(dtype), mask=there)


@triton.jit(
    do_not_specialize=["tokens", "features", "neurons", "x_stride"],
    do_not_specialize_on_alignment=["partials", "index"],
)
def gradient_kernel(
    partials,
    grad,
    x,
    index,
    tokens,
    features,
    neurons,
    x_stride,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PART: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """partials[part, f, k] = sum over the part's tokens of grad[t, f] x[t, index[k]]."""
    dtype = grad.dtype.element_ty
    if ALIGNED:
        features, x_stride = features // 16 * 16, x_stride // 16 * 16
    part = tl.program_id(0).to(tl.int64)
    grad += part * PART * features
    x += part * PART * x_stride
    left = (tokens - part * PART).to(tl.int32)
    t = tl.arange(0, TILE_T)
    f = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    k = tl.program_id(2) * TILE_K + tl.arange(0, TILE_K)
    total = tl.zeros([TILE_F, TILE_K], tl.float32)
    for _ in range(PART // TILE_T):
        there = (t < left)[:, None] & (f < features)[None, :]
        g = tl.load(grad + t[:, None] * features + f[None, :], mask=there, other=0.0)
        g = g.to(tl.float32) if UPCAST else g
        selected = _selected(x, left, k, neurons, x_stride, index, INDEXED, UPCAST, TILE_T, dtype)
        total = tl.dot(tl.trans(g), selected, total, input_precision=PRECISION)
        left -= TILE_T
        grad += TILE_T * tl.cast(features, tl.int64)
        x += TILE_T * tl.cast(x_stride, tl.int64)
    at = (part * features + f[:, None]) * neurons + k[None, :]
    tl.store(partials + at, total, mask=(f < features)[:, None] & (k < neurons)[None, :])


@triton.jit(do_not_specialize=["elements", "parts"])
def add_parts_kernel(partials, sums, elements, parts, BLOCK: tl.constexpr):
    """sums[i] = the sum over parts of partials[part, i], in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(partials + tl.cast(part, tl.int64) * elements + i, mask=i < elements, other=0.0)
    tl.store(sums + i, total, mask=i < elements)


def neuron_update(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
    neurons = direction.shape[1]
    if not (output.numel() and neurons) or not _served(output, input) or direction.numel() >= 2**31:
        return reference.neuron_update(output, input, direction, index).contiguous()
    features = output.shape[-1]
    flat, x = output.reshape(-1, features).contiguous(), _rows(input)
    direction = direction.to(output.dtype)
    if direction.stride(1) != 1:
        direction = direction.contiguous()
    config = update_configuration(output.dtype, neurons)
    aligned = _aligned(flat, x)
    if index is None and not aligned:
        index = torch.arange(neurons, device=x.device)  # any layout can be gathered from
    with torch.cuda.device_of(output):
        result = torch.empty_like(flat)
        groups = update_groups(flat.shape[0], features, config)
        update_kernel[(triton.cdiv(flat.shape[0], config["TILE_T"]), groups)](
            result,
            flat,
            x,
            direction,
            direction if index is None else index.contiguous(),
            flat.shape[0],
            features,
            neurons,
            x.stride(0),
            direction.stride(0),
            groups,
            INDEXED=index is not None,
            ALIGNED=aligned,
            PRECISION=precision(output.dtype),
            UPCAST=output.device.type == "cpu",
            **config,
        )
    return result.view(output.shape)


def neuron_gradient(grad_output: Tensor, input: Tensor, index: Tensor | None) -> Tensor:
    neurons = input.shape[-1] if index is None else index.numel()
    if not (grad_output.numel() and neurons) or not _served(grad_output, input):
        return reference.neuron_gradient(grad_output, input, index)
    features = grad_output.shape[-1]
    grad, x = grad_output.reshape(-1, features).contiguous(), _rows(input)
    config = gradient_configuration(grad.dtype, neurons)
    parts = triton.cdiv(grad.shape[0], TOKENS_IN_PART)
    aligned = _aligned(grad, x)
    if index is None and not aligned:
        index = torch.arange(neurons, device=x.device)
    with torch.cuda.device_of(grad):
        partials = torch.empty(parts, features, neurons, dtype=torch.float32, device=grad.device)
        gradient_kernel[(parts, triton.cdiv(features, config["TILE_F"]), triton.cdiv(neurons, config["TILE_K"]))](
            partials,
            grad,
            x,
            grad if index is None else index.contiguous(),
            grad.shape[0],
            features,
            neurons,
            x.stride(0),
            INDEXED=index is not None,
            ALIGNED=aligned,
            PRECISION=precision(grad.dtype),
            UPCAST=grad.device.type == "cpu",
            PART=TOKENS_IN_PART,
            **config,
        )
        if parts == 1:
            return partials[0]
        sums = torch.empty_like(partials[0])
        add_parts_kernel[(triton.cdiv(sums.numel(), ADD_BLOCK),)](
            partials, sums, sums.numel(), parts, BLOCK=ADD_BLOCK, **ADD_OPTIONS
        )
    return sums


def update_configuration(dtype: torch.dtype, neurons: int) -> dict[str, Any]:
    wide = dtype == torch.float32
    once = neurons <= MAX_TILE_K
    return {
        "ONCE": once,
        "TILE_T": 32 if wide else 64,
        "TILE_F": 32 if wide else 64,
        "TILE_K": _tile_k(neurons) if once else 32,
        "num_warps": 4 if wide else 8,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def update_groups(tokens: int, features: int, config: dict[str, Any]) -> int:
    """Programs that share a tile of tokens: enough to fill a large GPU where there are few tokens, else few."""
    wanted = triton.cdiv(512, triton.cdiv(tokens, config["TILE_T"]))
    return max(1, min(wanted, triton.cdiv(features, config["TILE_F"])))


def gradient_configuration(dtype: torch.dtype, neurons: int) -> dict[str, Any]:
    wide = dtype == torch.float32
    tile_k = min(_tile_k(neurons), 64) if wide else _tile_k(neurons)
    return {
        "TILE_T": 16 if wide else 32,
        "TILE_F": 64 if wide else 128,
        "TILE_K": tile_k,
        "num_warps": 4 if wide else 8,
        # Loads ahead only where their registers do not spill: many small programs hide each other's latency as well.
        "num_stages": 3 if tile_k == MAX_TILE_K else 1,
        "enable_fp_fusion": True,
    }


def _tile_k(neurons: int) -> int:
    return 64 if neurons <= 64 else MAX_TILE_K


def precision(dtype: torch.dtype) -> str:
    """How float32 factors are multiplied: as PyTorch's own matrix products are set to."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _served(rows: Tensor, x: Tensor) -> bool:
    """Whether there is a kernel for these dtypes, and a tile of tokens spans less than 2**31 elements."""
    return torch.float64 not in (rows.dtype, x.dtype) and max(rows.shape[-1], x.shape[-1]) < 2**24


def _rows(tensor: Tensor) -> Tensor:
    """[tokens, features] with features side by side; a view where that can be."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _aligned(rows: Tensor, x: Tensor) -> bool:
    """Whether every row of both begins on 16 elements, so that neighbours can be moved 16 bytes at a time."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in (rows, x))
