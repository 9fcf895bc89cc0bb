"""How the head's logits are cut into tiles, computed and turned into slopes; in which dtypes. See `linear_head`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends

# Of a tile: far below the logits of a batch, and enough that the products do not wait for memory.
CHUNK_BYTES = 256 << 20
SMALLEST_CHUNK_BYTES = 16 << 20
# The share of a device's memory that a tile may take.
MEMORY_SHARE = 64
# Of a tile that is not kept: what reads it again finds it in the cache, an L2 of a GPU or an L3.
CACHED_BYTES = 32 << 20
# With fewer columns, the sums [tokens, hidden] would be the traffic; tokens that do not fit then wait their turn.
FEWEST_COLUMNS = 1024
# Elements that are cast or gathered at once.
BLOCK_ELEMENTS = 1 << 22
# An ignore_index that no label has.
COUNTED = -1


class HeadOptions(NamedTuple):
    """The options of both head operators, in the order of their schemas: `*options` is what a schema takes.

    Attributes:
        ignore_index: the label of tokens that do not count.
        shift: 1 if labels lie beside their inputs, 0 if they lie beside the hidden states that predict them.
        dtype: what hidden states and weight are rounded to.
        scale, softcap: the logits are `cap(x * scale)`; see :func:`shapo_kernels.ops.linear_token_logps`.
        chunk_bytes: what a tile may take; `None` for the default of the device.
        group: name of the process group that the vocabulary is divided over, or `None`.
        statistics: also return each token's entropy, mean logit, and whether its label is the most likely token.
        padded: sizes of the kept tensors follow from shapes alone, as a compiled graph needs them.
    """

    ignore_index: int
    shift: int
    dtype: torch.dtype
    scale: float
    softcap: float | None
    chunk_bytes: int | None
    group: str | None
    statistics: bool
    padded: bool


class Tiles(NamedTuple):
    """How logits are cut, and the dtypes of products' factors, of tiles and of sums."""

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
        """At least one, so that each part of the tokens is finished, on a rank without a vocabulary too."""
        return parts(self.columns, self.columns_of_tile) if self.columns else iter([slice(0, 0)])

    def is_last(self, rows: slice, columns: slice) -> bool:
        return rows.stop == self.tokens and columns.stop == self.columns


def parts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def cut(
    count: int, weight: Tensor, head: HeadOptions, *, keeps: bool, widest: int | None = None, room: int | None = None
) -> Tiles:
    """How the logits of `count` tokens are cut.

    Args:
        keeps: the last tile is kept for the backward pass.
        widest: the largest number of columns that a rank holds, and `room` the fewest elements that a rank's tile may
            have. Ranks that share a vocabulary finish each part of the tokens together, so all must cut the tokens the
            same way, from numbers that all of them know.
    """
    factor, tile, sums = dtypes(weight.device, head.dtype)
    columns = len(weight)
    elements = limit(weight, head) if room is None else room
    widest = max(1, columns if widest is None else widest)
    if not keeps:
        elements = min(elements, CACHED_BYTES // tile.itemsize)
    # The tile that is kept and the one that is computed again exist at the same time.
    if keeps and count * widest > elements:
        elements = max(1, elements // 2)
    # A part of the weight that has to be cast is held beside its tile.
    beside = weight.shape[1] if factor != weight.dtype else 0
    tokens = max(1, min(count, elements // min(widest, FEWEST_COLUMNS)))
    step = max(1, min(columns, elements // (tokens + beside)))
    even = -(-columns // max(1, -(-columns // step)))
    # Rows that begin at a multiple of 64 bytes, where there is room for it.
    step = max(1, min(step, -(-even // 16) * 16))
    return Tiles(count, columns, tokens, step, factor, tile, sums)


def capacity(tokens: Any, weight: Tensor, head: HeadOptions) -> Any:
    """Elements of the largest tile, whatever the number of labelled tokens up to `tokens`."""
    return torch.sym_min(limit(weight, head), tokens * len(weight))


def limit(weight: Tensor, head: HeadOptions) -> int:
    """Elements that a tile may have."""
    return room(weight.device, head.dtype, head.chunk_bytes)


def room(device: torch.device, dtype: torch.dtype, chunk_bytes: int | None) -> int:
    """The same for any weight of a device, multiplied in `dtype`."""
    _, tile, _ = dtypes(device, dtype)
    return max(1, (chunk_bytes or default_chunk_bytes(device)) // tile.itemsize)


def dtypes(device: torch.device, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of factors, tiles and sums. 16-bit factors give float32 tiles on CUDA; CPUs that cannot multiply them cast."""
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
    """A share of the device's whole memory: what is free would vary from call to call."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = CHUNK_BYTES * MEMORY_SHARE
    return max(SMALLEST_CHUNK_BYTES, min(CHUNK_BYTES, memory // MEMORY_SHARE))


def labelled_inputs(hidden: Tensor, where: Tensor, head: HeadOptions, tiles: Tiles) -> Tensor:
    return hidden.detach()[where[:, 0], where[:, 1]].to(head.dtype).to(tiles.factor)


def weight_rows(weight: Tensor, rows: slice, head: HeadOptions, tiles: Tiles) -> Tensor:
    return weight.detach()[rows].to(head.dtype).to(tiles.factor)


def rounded(bias: Tensor | None, tiles: Tiles) -> Tensor | None:
    return None if bias is None else bias.detach().to(tiles.factor)


def project(inputs: Tensor, factor: Tensor, buffer: Tensor) -> Tensor:
    """A tile `[n, columns]` of products in the memory of `buffer`; the logits but for bias, scale and soft cap."""
    tile = buffer[: len(inputs) * len(factor)].view(len(inputs), len(factor))
    if tile.dtype == factor.dtype:
        return torch.mm(inputs, factor.t(), out=tile)
    return torch.mm(inputs, factor.t(), out_dtype=tile.dtype, out=tile)


def kernel(tile: torch.dtype, device: torch.device) -> Callable[..., None] | None:
    """What does all the work on a tile in one launch, where a backend has that."""
    return backends.find(device, "linear_tile") if tile == torch.float32 else None


def slopes(
    tile: Tensor,
    spare: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    columns: slice,
    per_token: Tensor,
    head: HeadOptions,
) -> Tensor:
    """`scale * ([v = y] - p_v) * bend` of a tile of products as a factor in the memory of `spare`, maybe its own."""
    fused = kernel(tile.dtype, tile.device)
    if fused is None:
        logits = finish_(tile, bias, columns, head)
        return slope(logits, spare, targets, columns, per_token, head.scale, bend_of(logits, head.softcap))
    factor = like(tile, spare)
    own = None if bias is None else bias[columns]
    fused(tile, factor, targets, own, columns.start, head.scale, head.softcap, per_token)
    return factor


def like(tile: Tensor, spare: Tensor) -> Tensor:
    """As many elements of `spare` in the tile's shape."""
    return spare[: tile.numel()].view_as(tile)


def finish_(tile: Tensor, bias: Tensor | None, columns: slice, head: HeadOptions) -> Tensor:
    """Products become logits."""
    if bias is not None:
        tile.add_(bias[columns])
    if head.scale != 1:
        tile.mul_(head.scale)
    if head.softcap is not None:
        tile.div_(head.softcap).tanh_().mul_(head.softcap)
    return tile


def bend_of(logits: Tensor, softcap: float | None) -> Tensor | None:
    """d cap(x) / dx = 1 - tanh(x / softcap)^2."""
    return None if softcap is None else logits.div(softcap).square_().neg_().add_(1)


def slope(
    logits: Tensor, spare: Tensor, targets: Tensor, columns: slice, per_token: Tensor, scale: float, bend: Tensor | None
) -> Tensor:
    """As `slopes`, of logits that are finished."""
    # A label that lies elsewhere counts and is not held; the kernels take none that is negative.
    logps, normalizers = per_token[:1].contiguous(), per_token[1:, None].contiguous()
    arguments = targets[None], logps, normalizers, torch.full_like(logps, scale), COUNTED, 0, columns.start
    return _gradient(logits, spare, arguments, bend)


def exponentials(logits: Tensor, spare: Tensor, highest: Tensor, bend: Tensor | None) -> Tensor:
    """`exp(x - highest) * bend` of a tile as a factor, in the memory of `spare`; 0 for logits of `-inf`."""
    finite = torch.where(highest == -torch.inf, 0.0, highest)
    zeros = torch.zeros_like(finite)[None]
    nothing = torch.zeros_like(zeros, dtype=torch.int64)
    normalizers = torch.stack([finite, torch.ones_like(finite)])[:, None]
    return _gradient(logits, spare, (nothing, zeros, normalizers, zeros - 1, COUNTED, 0, 1), bend)


def _gradient(logits: Tensor, spare: Tensor, arguments: tuple[Any, ...], bend: Tensor | None) -> Tensor:
    backends.function(logits.device, "token_logps_gradient_")(logits[None], *arguments)
    if bend is not None:
        logits.mul_(bend)
    return logits if logits.dtype == spare.dtype else like(logits, spare).copy_(logits)
