"""The table that tells one launch about every layer: pointers, strides, shapes, and each layer's first block.

It is built on the host, copied without waiting, and kept. Its key is all that it holds, so that a tensor whose storage
moved gets a new table and a recycled address cannot bring back a wrong one. This module launches no kernels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Fields of a layer's row, int64 each; subspace_kernels.py reads them by these numbers.
FIELDS = 12

#: Elements that one program works on: eight for each thread of four warps.
BLOCK = 1024

# A layer's dtype is its number here. The kernels are compiled for the first two alone and for any mixture.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXED = len(DTYPES)

# How a block finds its elements. SCATTERED serves every layout; the other two load and store 16 bytes at once.
SCATTERED, ROWS, WHOLE = 0, 1, 2

_MAX_INNER = 2**31 - BLOCK
_KEPT = 64
# Memory for captured tables: of this many words, and for as many tables as large as the one that an eager call needed.
_ARENA_WORDS, _ARENA_TABLES = 2**19, 64


@dataclass(frozen=True)
class LayerTable:
    """What a launch over all layers needs. `dtype` and `path` choose the kernel's specialisation."""

    fields: Tensor  # int64 [layers, FIELDS], then [layers + 1] first blocks
    layers: int
    blocks: int
    dtype: int
    path: int


def layer_table(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    axes: Sequence[int],
    computed: Sequence[Tensor] | None,
    backups: Sequence[Tensor] | None,
) -> LayerTable:
    """The table of layers with their compact companions, from the cache where it is there.

    Args:
        computed: compact tensors in the compute dtype (values, directions).
        backups: compact tensors in the layers' dtype.

    Raises:
        ValueError: a layer too wide for 32-bit positions inside a row. RuntimeError: a capture that came too early.
    """
    nothing = (0,) * len(tensors)
    to = nothing if computed is None else tuple(t.data_ptr() for t in computed)
    kept = nothing if backups is None else tuple(t.data_ptr() for t in backups)
    rows = [
        (
            tensor.data_ptr(),
            index.data_ptr(),
            index.stride(0),
            to[i],
            kept[i],
            tensor.stride(0),
            tensor.stride(1),
            axis,
            tensor.shape[1] if axis == 0 else index.shape[0],
            (index.shape[0] if axis == 0 else tensor.shape[0]),
            tensor.shape[axis],
            DTYPES.index(tensor.dtype),
        )
        for i, (tensor, index, axis) in enumerate(zip(tensors, indices, axes, strict=True))
    ]
    return _cached(tuple(rows), ROWS if all(map(_has_wide_rows, rows)) else SCATTERED, tensors[0].device)


def whole_table(values: Sequence[Tensor]) -> LayerTable:
    """The table of contiguous tensors, each one layer of a single row."""
    rows = [(v.data_ptr(), 0, 0, 0, 0, v.numel(), 1, 0, v.numel(), 1, 1, DTYPES.index(v.dtype)) for v in values]
    return _cached(tuple(rows), WHOLE, values[0].device)


def _has_wide_rows(row: tuple[int, ...]) -> bool:
    """Whether the neurons are rows whose elements, and compact copies, can be moved 16 bytes at a time."""
    data, _, _, to, kept, row_stride, column_stride, axis, inner, *_ = row
    aligned = all(address % 16 == 0 for address in (data, to, kept))
    return axis == 0 and column_stride == 1 and row_stride % 16 == 0 and inner % 16 == 0 and aligned


_tables: OrderedDict[tuple[Any, ...], LayerTable] = OrderedDict()
# A captured graph copies its tables from page-locked memory at every replay, so that what it was given is never reused.
_captured: list[LayerTable] = []
_captured_words: list[Tensor] = []
_arena: Tensor | None = None
_arena_used = 0


def _cached(rows: tuple[tuple[int, ...], ...], path: int, device: torch.device) -> LayerTable:
    if device.type != "cuda":
        return _build(rows, path, device)
    if torch.cuda.is_current_stream_capturing():
        table = _build(rows, path, device, capturing=True)
        _captured.append(table)
        return table
    _set_memory_aside(_words(len(rows)))
    # The stream is part of the key: the copy that fills a table is ordered before the launches of its own stream only.
    key = (rows, path, device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tables:
        _tables[key] = _build(rows, path, device)
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _build(
    rows: tuple[tuple[int, ...], ...], path: int, device: torch.device, *, capturing: bool = False
) -> LayerTable:
    layers = len(rows)
    counts = [_blocks_of(row, path) for row in rows]
    words = _words(layers)
    host = _host_words(words, device, capturing=capturing)
    host[: layers * FIELDS] = torch.tensor(rows, dtype=torch.int64).flatten()
    starts = host[layers * FIELDS :]
    starts[0] = 0
    torch.cumsum(torch.tensor(counts, dtype=torch.int64), 0, out=starts[1:])
    fields = host
    if device.type == "cuda":
        fields = torch.empty(words, dtype=torch.int64, device=device)
        fields.copy_(host, non_blocking=True)
    codes = {row[-1] for row in rows}
    return LayerTable(
        fields=fields,
        layers=layers,
        blocks=sum(counts),
        dtype=codes.pop() if codes in ({0}, {1}) else MIXED,
        path=path,
    )


def _blocks_of(row: tuple[int, ...], path: int) -> int:
    inner, outer = row[8], row[9]
    if path == WHOLE:
        return -(-inner // BLOCK)
    if inner > _MAX_INNER:
        raise ValueError(f"a layer is {inner} elements wide: the Triton kernels take up to {_MAX_INNER}")
    return outer * -(-inner // BLOCK) if path == ROWS else -(-outer * inner // BLOCK)


def _host_words(words: int, device: torch.device, *, capturing: bool) -> Tensor:
    """Host memory to build a table in: page-locked where it is copied to a GPU, so that the copy waits for nothing."""
    global _arena_used
    if device.type != "cuda":
        return torch.empty(words, dtype=torch.int64)
    if not capturing:
        return _pinned(words)
    if _arena is None or _arena_used + words > len(_arena):
        raise RuntimeError(
            "no host memory is set aside for capturing these operators in a CUDA graph: "
            "run them once outside of a capture before each capture"
        )
    _arena_used += words
    part = _arena[_arena_used - words : _arena_used]
    _captured_words.append(part)
    return part


def _set_memory_aside(words: int) -> None:
    """For captures: page-locked memory cannot be allocated while a graph is captured."""
    global _arena, _arena_used
    wanted = max(_ARENA_WORDS, _ARENA_TABLES * words)
    if _arena is None or len(_arena) - _arena_used < wanted // 2:
        _arena, _arena_used = _pinned(wanted), 0


def _words(layers: int) -> int:
    return layers * FIELDS + layers + 1


def _pinned(words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64, pin_memory=True)
