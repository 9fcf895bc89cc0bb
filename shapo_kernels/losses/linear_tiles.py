"""How the logits of a head are cut into tiles, made, and multiplied; the dtypes of all that. See ``linear_head``."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends

# Of a tile: far below the logits of a batch, and enough that the products do not wait for memory.
CHUNK_BYTES = 256 << 20
SMALLEST_CHUNK_BYTES = 16 << 20
# The share of a device's memory that a tile may take.
MEMORY_SHARE = 64
# With fewer, the sums [tokens, hidden] would be the traffic; tokens beyond what this leaves room for wait their turn.
FEWEST_COLUMNS = 1024
# Elements that are cast or gathered at once.
BLOCK_ELEMENTS = 1 << 22
# An ignore_index that no label has.
COUNTED = -1


class Tiles(NamedTuple):
    """How logits are cut and in which dtypes: factors of products, tiles, sums."""

    tokens: int
    columns: int
    rows_of_tile: int
    columns_of_tile: int
    factor: torch.dtype
    tile: torch.dtype
    sum: torch.dtype

    def token_parts(self) -> Iterator[slice]:
        return parts(self.tokens, self.rows_of_tile)

    def column_parts(self) -> Iterator[slice]:
        return parts(self.columns, self.columns_of_tile)

    def is_last(self, rows: slice, columns: slice) -> bool:
        return rows.stop == self.tokens and columns.stop == self.columns


def parts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def cut(count: int, weight: Tensor, dtype: torch.dtype, chunk_bytes: int | None, *, keeps: bool) -> Tiles:
    factor, tile, sums = dtypes(weight.device, dtype)
    elements, columns = _limit(weight, dtype, chunk_bytes), len(weight)
    # The tile that is kept and the one that is made again lie side by side.
    if keeps and count * columns > elements:
        elements = max(1, elements // 2)
    # A part of the weight that has to be cast is held beside its tile.
    beside = weight.shape[1] if factor != weight.dtype else 0
    tokens = max(1, min(count, elements // min(columns, FEWEST_COLUMNS)))
    step = max(1, min(columns, elements // (tokens + beside)))
    even = -(-columns // -(-columns // step))
    # Rows that begin at a multiple of 64 bytes, where that is allowed.
    step = min(step, -(-even // 16) * 16)
    return Tiles(count, columns, tokens, step, factor, tile, sums)


def capacity(tokens: Any, weight: Tensor, dtype: torch.dtype, chunk_bytes: int | None) -> Any:
    """Elements of the largest tile, whatever the number of labelled tokens up to ``tokens``."""
    return torch.sym_min(_limit(weight, dtype, chunk_bytes), tokens * len(weight))


def _limit(weight: Tensor, dtype: torch.dtype, chunk_bytes: int | None) -> int:
    _, tile, _ = dtypes(weight.device, dtype)
    return max(1, (chunk_bytes or default_chunk_bytes(weight.device)) // tile.itemsize)


def dtypes(device: torch.device, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of factors, tiles and sums. 16-bit factors are multiplied into fp32 on CUDA, and as fp32 on CPUs without them."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype in (sums, torch.float32):
        return dtype, dtype, sums
    if device.type == "cuda":
        return dtype, torch.float32, sums
    return (dtype, dtype, sums) if device.type != "cpu" or _multiplies(dtype) else (sums, sums, sums)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of 16-bit numbers; without, PyTorch's are 100 times slower."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    ask = getattr(torch.ops.mkldnn, name, None)
    return ask is not None and bool(ask())


@functools.cache
def default_chunk_bytes(device: torch.device) -> int:
    """What a tile may take: a share of the device's memory (of all of it: what is free would vary)."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = CHUNK_BYTES * MEMORY_SHARE
    return max(SMALLEST_CHUNK_BYTES, min(CHUNK_BYTES, memory // MEMORY_SHARE))


def labelled_inputs(hidden: Tensor, where: Tensor, dtype: torch.dtype, tiles: Tiles) -> Tensor:
    return hidden.detach()[where[:, 0], where[:, 1]].to(dtype).to(tiles.factor)


def weight_rows(weight: Tensor, rows: slice, dtype: torch.dtype, tiles: Tiles) -> Tensor:
    return weight.detach()[rows].to(dtype).to(tiles.factor)


def project(
    inputs: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    columns: slice,
    scale: float,
    softcap: float | None,
    buffer: Tensor,
) -> Tensor:
    """A tile ``[n, columns]`` of logits in the memory of ``buffer``."""
    logits = buffer[: len(inputs) * len(factor)].view(len(inputs), len(factor))
    if logits.dtype == factor.dtype:
        torch.mm(inputs, factor.t(), out=logits)
    else:
        torch.mm(inputs, factor.t(), out_dtype=logits.dtype, out=logits)
    if bias is not None:
        logits.add_(bias.detach()[columns].to(factor.dtype))
    if scale != 1:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def bend_of(logits: Tensor, softcap: float | None) -> Tensor | None:
    """d cap(x) / dx = 1 - tanh(x / softcap)^2."""
    return None if softcap is None else logits.div(softcap).square_().neg_().add_(1)


def slope_(logits: Tensor, targets: Tensor, columns: slice, per_token: Tensor, scale: float) -> None:
    """``scale * ([v = y] - p_v)`` over the memory of a tile's logits."""
    # A label elsewhere is counted and not held; the kernels take none that is negative.
    logps, normalizers = per_token[:1].contiguous(), per_token[1:, None].contiguous()
    backends.function(logits.device, "token_logps_gradient_")(
        logits[None],
        targets[None],
        logps,
        normalizers,
        torch.full_like(logps, scale),
        COUNTED,
        0,
        columns.start,
    )


def operand(tile: Tensor, spare: Tensor) -> Tensor:
    """The tile in the dtype of factors, which ``spare`` has."""
    return tile if tile.dtype == spare.dtype else spare[: tile.numel()].view_as(tile).copy_(tile)


# -- products


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``: with 16-bit factors rounded on the way only where the device cannot do otherwise."""
    if a.dtype != dtype and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def put_product_(to: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """``to = a @ b``, or ``to += a @ b``, rounded once."""
    if add and to.dtype == a.dtype:
        to.addmm_(a, b)
    elif to.dtype == a.dtype:
        torch.mm(a, b, out=to)
    else:
        for part in parts(len(to), max(1, BLOCK_ELEMENTS // to.shape[1])):
            product = multiply(a[part], b, to.dtype)
            if add:
                to[part] += product
            else:
                to[part] = product
