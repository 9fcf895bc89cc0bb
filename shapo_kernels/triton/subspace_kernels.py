"""Triton kernels of the subspace update; subspace_update.py launches them.

A program works on ``BLOCK`` consecutive elements of one layer's compact form, or on a part of one row; tables.py tells it
which. What it sums is written out under its number, and a second kernel adds those numbers in their order: atomics would
make a norm, and through it every weight, differ from run to run.

Elements are moved as they are and computed on in float32 (float64 for float64): Triton's interpreter must not do arithmetic
in bfloat16, and the compiled kernels gain nothing by it. An index outside of its layer reads as NaN, which makes the norm
NaN and the scale 0; it is never written to.
"""

import triton
import triton.language as tl

from .tables import FIELDS as _FIELDS
from .tables import ROWS as _ROWS
from .tables import WHOLE as _WHOLE

FIELDS = tl.constexpr(_FIELDS)
ROWS = tl.constexpr(_ROWS)
WHOLE = tl.constexpr(_WHOLE)
# What weights are rounded to before they are compared: nothing, or the dtype of that number in tables.DTYPES.
KEEP = tl.constexpr(-1)


@triton.jit
def _layer_of(table, layer_of_block, layers):
    """The layer of this program, its row in the table, and the block's number within the layer."""
    block = tl.program_id(0)
    layer = tl.load(layer_of_block + block)
    first = tl.load(table + layers * FIELDS + layer)
    return layer, table + layer * FIELDS, block.to(tl.int64) - first


@triton.jit
def _elements(row, block, PATH: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets in the compact form and in the layer, which of them exist, and which of those lie inside the layer."""
    lanes = tl.arange(0, BLOCK)
    inner = tl.load(row + 8)
    if PATH == WHOLE:
        compact = block * BLOCK + lanes
        there = compact < inner
        return compact, compact, there, there
    index = tl.load(row + 1).to(tl.pointer_type(tl.int64))
    index_stride = tl.load(row + 2)
    row_stride = tl.load(row + 5)
    neurons = tl.load(row + 10)
    if PATH == ROWS:
        inner = tl.multiple_of(inner, 16)
        across = tl.cdiv(inner, BLOCK)
        place = block // across
        column = (block - place * across) * BLOCK + lanes
        neuron = tl.load(index + place * index_stride)
        there = column < inner
        inside = column < tl.where((neuron >= 0) & (neuron < neurons), inner, 0)
        return place * inner + column, neuron * tl.multiple_of(row_stride, 16) + column, there, inside
    column_stride = tl.load(row + 6)
    axis = tl.load(row + 7)
    outer = tl.load(row + 9)
    compact = block * BLOCK + lanes
    there = compact < outer * inner
    # One 64-bit division for the block, 32-bit ones for its lanes: those of 64 bits take some seventy instructions.
    above = (block * BLOCK) // inner
    beside = (block * BLOCK - above * inner).to(tl.int32) + lanes
    down = beside // inner.to(tl.int32)
    a = above + down
    b = (beside - down * inner.to(tl.int32)).to(tl.int64)
    neuron = tl.load(index + tl.where(axis == 1, b, a) * index_stride, mask=there, other=0)
    inside = there & (neuron >= 0) & (neuron < neurons)
    return (
        compact,
        tl.where(axis == 1, a, neuron) * row_stride + tl.where(axis == 1, neuron, b) * column_stride,
        there,
        inside,
    )


@triton.jit
def _pointer(row, field, DTYPE: tl.constexpr, PATH: tl.constexpr):
    """A pointer from a layer's row. Its dtype is a number of tables.DTYPES."""
    address = tl.load(row + field)
    if DTYPE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif DTYPE == 2:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float64))
    if PATH == ROWS or PATH == WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widen(x, DTYPE: tl.constexpr):
    return x if DTYPE == 3 else x.to(tl.float32)


@triton.jit
def _gather(row, block, PATH: tl.constexpr, DTYPE: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    compact, place, there, inside = _elements(row, block, PATH, BLOCK)
    x = _widen(tl.load(_pointer(row, 0, DTYPE, PATH) + place, mask=inside, other=float("nan")), DTYPE)
    if WRITE:
        tl.store(_pointer(row, 3, 3 if DTYPE == 3 else 0, PATH) + compact, x, mask=there)
    wide = tl.where(there, x, 0.0).to(tl.float64)
    return tl.sum(wide * wide, 0)


@triton.jit(do_not_specialize=["layers"])
def gather_kernel(
    table,
    layer_of_block,
    layers,
    partials,
    PATH: tl.constexpr,
    DTYPE: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[block] = the block's sum of squares; the values go to the compact form if ``WRITE``."""
    _, row, block = _layer_of(table, layer_of_block, layers)
    if DTYPE < 4:
        square = _gather(row, block, PATH, DTYPE, WRITE, BLOCK)
    else:
        code = tl.load(row + 11)
        if code == 0:
            square = _gather(row, block, PATH, 0, WRITE, BLOCK)
        elif code == 1:
            square = _gather(row, block, PATH, 1, WRITE, BLOCK)
        elif code == 2:
            square = _gather(row, block, PATH, 2, WRITE, BLOCK)
        else:
            square = _gather(row, block, PATH, 3, WRITE, BLOCK)
    tl.store(partials + tl.program_id(0), square)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """x in float64 after rounding to the compute dtype."""
    if ROUND == 0:
        x = x.to(tl.float32)
    elif ROUND == 1:
        x = x.to(tl.bfloat16).to(tl.float32)
    elif ROUND == 2:
        x = x.to(tl.float16).to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def _perturb(
    row, block, scale, PATH: tl.constexpr, DTYPE: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    COMPUTE: tl.constexpr = 3 if DTYPE == 3 else 0
    compact, place, there, inside = _elements(row, block, PATH, BLOCK)
    weight = _pointer(row, 0, DTYPE, PATH) + place
    old = tl.load(weight, mask=inside, other=float("nan"))
    tl.store(_pointer(row, 4, DTYPE, PATH) + compact, old, mask=there)
    before = tl.where(inside, _widen(old, DTYPE), 0.0)
    wide = before.to(tl.float64)
    old_square = tl.sum(wide * wide, 0)
    moved_square = tl.zeros_like(old_square)
    moved_step = tl.zeros_like(old_square)
    if scale != 0.0:  # else the weights keep every bit, whatever the direction holds
        direction = tl.load(_pointer(row, 3, COMPUTE, PATH) + compact, mask=inside, other=0.0)
        # Product and sum are rounded one by one (the launcher turns fusing off), as every backend does.
        step = direction * _widen(scale, 3 if DTYPE == 3 else 0)
        fresh = (before + step).to(old.dtype)
        tl.store(weight, fresh, mask=inside)
        moved = _rounded(_widen(fresh, DTYPE), DTYPE, ROUND) - _rounded(before, DTYPE, ROUND)
        moved_square = tl.sum(moved * moved, 0)
        moved_step = tl.sum(moved * step.to(tl.float64), 0)
    return moved_square, moved_step, old_square


@triton.jit(do_not_specialize=["layers", "blocks"], do_not_specialize_on_alignment=["scales"])
def perturb_kernel(
    table,
    layer_of_block,
    layers,
    blocks,
    scales,
    partials,
    PATH: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Old bits to the backup, W += scale * direction; partials[c, block] = the block's three sums."""
    layer, row, block = _layer_of(table, layer_of_block, layers)
    scale = tl.load(scales + layer)
    if DTYPE < 4:
        square, along, old = _perturb(row, block, scale, PATH, DTYPE, ROUND, BLOCK)
    else:
        code = tl.load(row + 11)
        if code == 0:
            square, along, old = _perturb(row, block, scale, PATH, 0, ROUND, BLOCK)
        elif code == 1:
            square, along, old = _perturb(row, block, scale, PATH, 1, ROUND, BLOCK)
        elif code == 2:
            square, along, old = _perturb(row, block, scale, PATH, 2, ROUND, BLOCK)
        else:
            square, along, old = _perturb(row, block, scale, PATH, 3, ROUND, BLOCK)
    at = partials + tl.program_id(0)
    tl.store(at, square)
    tl.store(at + blocks, along)
    tl.store(at + 2 * tl.cast(blocks, tl.int64), old)


@triton.jit
def _restore(row, block, PATH: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    compact, place, _, inside = _elements(row, block, PATH, BLOCK)
    old = tl.load(_pointer(row, 4, DTYPE, PATH) + compact, mask=inside)
    tl.store(_pointer(row, 0, DTYPE, PATH) + place, old, mask=inside)


@triton.jit(do_not_specialize=["layers"])
def restore_kernel(
    table, layer_of_block, layers, PATH: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """The backup's bits back into the layers."""
    _, row, block = _layer_of(table, layer_of_block, layers)
    if DTYPE < 4:
        _restore(row, block, PATH, DTYPE, BLOCK)
    else:
        code = tl.load(row + 11)
        if code == 0:
            _restore(row, block, PATH, 0, BLOCK)
        elif code == 1 or code == 2:  # bits are moved, so that one 16-bit dtype is like the other
            _restore(row, block, PATH, 1, BLOCK)
        else:
            _restore(row, block, PATH, 3, BLOCK)


@triton.jit
def _add(partials, first, last, CHUNK: tl.constexpr):
    """partials[first] + ... + partials[last - 1], in an order that depends on their number alone."""
    lanes = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(first, last, CHUNK):
        total += tl.load(partials + start + lanes, mask=start + lanes < last, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["layers", "blocks"], do_not_specialize_on_alignment=["sums"])
def add_kernel(table, layers, blocks, partials, sums, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """sums[layer, c] = the sum of the layer's blocks in partials[c]; one program for each layer."""
    layer = tl.program_id(0)
    first = tl.load(table + layers * FIELDS + layer)
    last = tl.load(table + layers * FIELDS + layer + 1)
    for column in tl.static_range(COLUMNS):
        total = _add(partials + column * tl.cast(blocks, tl.int64), first, last, CHUNK)
        tl.store(sums + layer * COLUMNS + column, total)


@triton.jit
def _factor(square, radius, eta):
    usable = (square > 0.0) & (square < float("inf")) & (tl.abs(radius) < float("inf"))
    return tl.where(usable, radius / (tl.sqrt(square) + eta), 0.0)


@triton.jit(do_not_specialize=["layers", "blocks"], do_not_specialize_on_alignment=["squares", "rho", "weight_squares", "scales"])
def add_and_scale_kernel(
    table,
    layers,
    blocks,
    partials,
    squares,
    rho,
    weight_squares,
    scales,
    eta_high,
    eta_low,
    NORM: tl.constexpr,
    RELATIVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The norms' second stage and the scale in one: squares[layer] and scales[layer]; one program for each layer.

    Every program adds all blocks for the global norm, in the same order: that is cheaper than another launch.
    ``NORM`` is 0 global, 1 layer, 2 none. A float argument is a float32, so that eta comes in two parts.
    """
    layer = tl.program_id(0)
    first = tl.load(table + layers * FIELDS + layer)
    last = tl.load(table + layers * FIELDS + layer + 1)
    eta = tl.cast(eta_high, tl.float64) + tl.cast(eta_low, tl.float64)
    own = _add(partials, first, last, CHUNK)
    tl.store(squares + layer, own)
    radius = tl.load(rho + layer)
    if NORM == 1:
        if RELATIVE:
            radius *= tl.sqrt(tl.load(weight_squares + layer))
        scale = _factor(own, radius, eta)
    else:
        everything = _add(partials, tl.zeros_like(first), tl.zeros_like(first) + blocks, CHUNK)
        if NORM == 0:
            if RELATIVE:
                zero = tl.zeros_like(first)
                radius *= tl.sqrt(_add(weight_squares, zero, zero + layers, CHUNK))
            scale = _factor(everything, radius, eta)
        else:
            scale = tl.where(everything < float("inf"), radius, 0.0)
    tl.store(scales + layer, scale)


@triton.jit(do_not_specialize=["layers"], do_not_specialize_on_alignment=["squares", "rho", "weight_squares", "scales"])
def scale_kernel(
    squares,
    layers,
    rho,
    weight_squares,
    scales,
    eta_high,
    eta_low,
    NORM: tl.constexpr,
    RELATIVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """scales[layer] from squared norms that are there already (a collective may have added them up)."""
    layer = tl.program_id(0)
    eta = tl.cast(eta_high, tl.float64) + tl.cast(eta_low, tl.float64)
    zero = tl.zeros([], tl.int64)
    radius = tl.load(rho + layer)
    if NORM == 1:
        if RELATIVE:
            radius *= tl.sqrt(tl.load(weight_squares + layer))
        scale = _factor(tl.load(squares + layer), radius, eta)
    else:
        everything = _add(squares, zero, zero + layers, CHUNK)
        if NORM == 0:
            if RELATIVE:
                radius *= tl.sqrt(_add(weight_squares, zero, zero + layers, CHUNK))
            scale = _factor(everything, radius, eta)
        else:
            scale = tl.where(everything < float("inf"), radius, 0.0)
    tl.store(scales + layer, scale)
