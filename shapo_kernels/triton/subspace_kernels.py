"""Triton kernels of the subspace update; subspace_update.py launches them.

A program works on `BLOCK` consecutive elements of one layer's compact form, or on a part of one row; tables.py tells
it which. What it sums is written out under its number, and a second kernel adds those numbers in their order: atomics
would make a norm, and through it every weight, differ from run to run.

Elements are moved as they are and computed on in float32 (float64 for float64): Triton's interpreter must not do
arithmetic in bfloat16, and the compiled kernels gain nothing by it. An index outside of its layer reads as NaN, which
makes the norm NaN and the scale 0; it is never written to.
"""

import triton
import triton.language as tl

from .tables import FIELDS as _FIELDS
from .tables import MIXED as _MIXED
from .tables import ROWS as _ROWS
from .tables import SCATTERED as _SCATTERED
from .tables import WHOLE as _WHOLE

FIELDS = tl.constexpr(_FIELDS)
SCATTERED = tl.constexpr(_SCATTERED)
ROWS = tl.constexpr(_ROWS)
WHOLE = tl.constexpr(_WHOLE)
MIXED = tl.constexpr(_MIXED)


@triton.jit
def _layer_of(table, layers):
    """The layer of this program, its row in the table, and the block's number within the layer."""
    block = tl.program_id(0).to(tl.int64)
    starts = table + layers * FIELDS
    low = tl.zeros([], tl.int64)
    high = low + layers
    while high - low > 1:  # the last layer whose first block is not behind this one: layers without blocks are skipped
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, table + low * FIELDS, block - tl.load(starts + low)


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
    if PATH != SCATTERED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widen(x, DTYPE: tl.constexpr):
    return x if DTYPE == 3 else x.to(tl.float32)


@triton.jit
def _gather(row, block, PATH: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    compact, place, there, inside = _elements(row, block, PATH, BLOCK)
    source = _pointer(row, 0, DTYPE, PATH) + place
    if PATH == WHOLE:
        if (block + 1) * BLOCK <= tl.load(row + 8):  # without a mask, whose end is on no 16 bytes, loads are wide
            x = tl.load(source)
        else:
            x = tl.load(source, mask=there, other=0.0)
        x = _widen(x, DTYPE)
    else:
        x = _widen(tl.load(source, mask=inside, other=float("nan")), DTYPE)
        if tl.load(row + 3) != 0:
            tl.store(_pointer(row, 3, 3 if DTYPE == 3 else 0, PATH) + compact, x, mask=there)
        x = tl.where(there, x, 0.0)
    wide = x.to(tl.float64)
    return tl.sum(wide * wide, 0)


@triton.jit(do_not_specialize=["layers"])
def gather_kernel(table, layers, partials, PATH: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """partials[block] = the block's sum of squares; values go to the compact form where the layer has one."""
    _, row, block = _layer_of(table, layers)
    if DTYPE != MIXED:
        square = _gather(row, block, PATH, DTYPE, BLOCK)
    else:
        code = tl.load(row + 11)
        if code == 0:
            square = _gather(row, block, PATH, 0, BLOCK)
        elif code == 1:
            square = _gather(row, block, PATH, 1, BLOCK)
        elif code == 2:
            square = _gather(row, block, PATH, 2, BLOCK)
        else:
            square = _gather(row, block, PATH, 3, BLOCK)
    tl.store(partials + tl.program_id(0), square)


@triton.jit
def _rounded(x, rounding):
    """x in float64 after rounding to the dtype of that number in tables.DTYPES, or as it is."""
    single = x.to(tl.float32)  # first, as PyTorch does; from float64 to bfloat16 the interpreter is wrong
    half = tl.where(rounding == 1, single.to(tl.bfloat16).to(tl.float32), single.to(tl.float16).to(tl.float32))
    narrow = tl.where(rounding == 0, single, half)
    return tl.where(rounding < 0, x.to(tl.float64), narrow.to(tl.float64))


@triton.jit
def _perturb(row, block, scale, rounding, PATH: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    COMPUTE: tl.constexpr = 3 if DTYPE == 3 else 0
    compact, place, there, inside = _elements(row, block, PATH, BLOCK)
    weight = _pointer(row, 0, DTYPE, PATH) + place
    old = tl.load(weight, mask=inside, other=float("nan"))
    tl.store(_pointer(row, 4, DTYPE, PATH) + compact, old, mask=there)
    before = tl.where(inside, _widen(old, DTYPE), 0.0)
    moved_square = tl.zeros([], tl.float64)
    moved_step = tl.zeros([], tl.float64)
    if scale != 0.0:  # else the weights keep every bit, whatever the direction holds
        direction = tl.load(_pointer(row, 3, COMPUTE, PATH) + compact, mask=inside, other=0.0)
        # Product and sum are rounded one by one (the launcher turns fusing off), as every backend does.
        step = direction * _widen(scale, COMPUTE)
        fresh = (before + step).to(old.dtype)
        tl.store(weight, fresh, mask=inside)
        moved = _rounded(_widen(fresh, DTYPE), rounding) - _rounded(before, rounding)
        moved_square = tl.sum(moved * moved, 0)
        moved_step = tl.sum(moved * step.to(tl.float64), 0)
    wide = before.to(tl.float64)
    return moved_square, moved_step, tl.sum(wide * wide, 0)


@triton.jit(do_not_specialize=["layers", "blocks", "rounding"], do_not_specialize_on_alignment=["scales"])
def perturb_kernel(
    table,
    layers,
    blocks,
    scales,
    rounding,
    partials,
    PATH: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Old bits to the backup, W += scale * direction; partials[c, block] = the block's three sums."""
    layer, row, block = _layer_of(table, layers)
    scale = tl.load(scales + layer)
    if DTYPE != MIXED:
        square, along, old = _perturb(row, block, scale, rounding, PATH, DTYPE, BLOCK)
    else:
        code = tl.load(row + 11)
        if code == 0:
            square, along, old = _perturb(row, block, scale, rounding, PATH, 0, BLOCK)
        elif code == 1:
            square, along, old = _perturb(row, block, scale, rounding, PATH, 1, BLOCK)
        elif code == 2:
            square, along, old = _perturb(row, block, scale, rounding, PATH, 2, BLOCK)
        else:
            square, along, old = _perturb(row, block, scale, rounding, PATH, 3, BLOCK)
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
def restore_kernel(table, layers, PATH: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The backup's bits back into the layers."""
    _, row, block = _layer_of(table, layers)
    if DTYPE != MIXED:
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
def _scale(
    own, everything, radius, weight_squares, layer, layers, eta_high, eta_low, norm, relative, CHUNK: tl.constexpr
):
    """The formula of perturbation_scale for one layer. Float arguments are float32, so that eta comes in two parts."""
    if relative != 0:
        zero = tl.zeros([], tl.int64)
        all_weights = _add(weight_squares, zero, zero + layers, CHUNK)
        radius = radius * tl.sqrt(tl.where(norm == 1, tl.load(weight_squares + layer), all_weights))
    square = tl.where(norm == 1, own, everything)
    eta = tl.cast(eta_high, tl.float64) + tl.cast(eta_low, tl.float64)
    usable = (square > 0.0) & (square < float("inf")) & (tl.abs(radius) < float("inf"))
    scale = tl.where(usable, radius / (tl.sqrt(square) + eta), 0.0)
    return tl.where(norm == 2, tl.where(everything < float("inf"), radius, 0.0), scale)


@triton.jit(
    do_not_specialize=["layers", "norm", "relative"],
    do_not_specialize_on_alignment=["squares", "rho", "weight_squares"],
)
def scale_kernel(
    squares,
    layers,
    rho,
    weight_squares,
    scales,
    eta_high,
    eta_low,
    norm,
    relative,
    CHUNK: tl.constexpr,
):
    """scales[layer] from the squared norms of all layers. `norm` is 0 global, 1 layer, 2 none."""
    layer = tl.program_id(0)
    zero = tl.zeros([], tl.int64)
    everything = _add(squares, zero, zero + layers, CHUNK)
    own = tl.load(squares + layer)
    radius = tl.load(rho + layer)
    scale = _scale(own, everything, radius, weight_squares, layer, layers, eta_high, eta_low, norm, relative, CHUNK)
    tl.store(scales + layer, scale)
