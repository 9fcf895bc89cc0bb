"""Log-probabilities of labels in Triton; documented in :mod:`shapo_kernels.ops.sequence_logps`.

Forward, a program walks one token's logits. Each of its threads keeps a maximum and a sum, which are joined at the end,
so that nothing waits for a reduction on the way. Backward, a program writes a part of one token's gradient, and the
label's element last.

float32 exponentials are powers of two with log2(e) folded in, 2^(x L - c) with L = log2(e) and c = m L rounded to
float32: one fused multiply-add and one EX2 for an element. Rounding c only moves the shift, by the same factor
2^(c - m L) for all elements of a token; it is taken out once for each token in float64. A label outside of the
vocabulary reads nothing; the public function asserts that there is none.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Lanes of a program, by whether they compute in float64; tiles of a gradient program.
LANES = {False: 4096, True: 1024}
STEPS = 4
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# Shapes and positions that change from batch to batch: compiled once for all.
_CHANGING = ["rows", "length", "label_row_stride", "label_stride", "ignore_index", "shift", "first"]

LOG2_E = tl.constexpr(1.44269502162933349609375)  # log2(e) in float32
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(labels, token, length, label_row_stride, label_stride, ignore_index, shift):
    """Whether a token has a label, and which."""
    position = token % length + shift
    there = position < length
    at = (token // length) * label_row_stride + position * label_stride
    label = tl.load(labels + at, mask=there, other=0)
    return there & (label != ignore_index), label


@triton.jit
def _fold(highest, WIDE: tl.constexpr):
    """(a, c) of 2^(x a - c), given the maximum m; of e^(x a - c) in float64.

    Nothing is subtracted from logits that are all masked, whose difference would be NaN. From 2^30 on rounding m L is
    off by more than 2^6 and can overflow, but numbers are 2^6 and more apart: there any a makes 1 of the maximum and 0
    of all else, and 1 leaves m a exact.
    """
    finite = tl.where(highest == -float("inf"), 0.0, highest)
    if WIDE:
        return tl.where(finite == finite, 1.0, finite), finite
    else:
        a = tl.where(tl.abs(finite) < 2.0**30, LOG2_E, 1.0)
        return a, finite * a


@triton.jit
def _fall(before, a, c, WIDE: tl.constexpr):
    """The exponent by which sums below the maximum `before` shrink below that of (a, c)."""
    a_before, c_before = _fold(before, WIDE)
    nothing = before == -float("inf")
    if not WIDE:
        nothing |= a_before != a
    return tl.where(nothing, -float("inf"), c_before - c)


@triton.jit
def _exponent(x, a, c, WIDE: tl.constexpr, EMULATE: tl.constexpr):
    """`EMULATE`: for the interpreter, which rounds a product before it adds."""
    if WIDE:
        return x - c
    elif EMULATE:
        return (x.to(tl.float64) * a.to(tl.float64) - c.to(tl.float64)).to(tl.float32)
    else:
        return x * a - c


@triton.jit
def _power(exponent, WIDE: tl.constexpr, PTX: tl.constexpr):
    """`PTX`: one instruction, without the handling of results below 1e-38, which become 0."""
    if WIDE:
        return tl.exp(exponent)
    elif PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(exponent)


@triton.jit
def _correction(highest, a, c, WIDE: tl.constexpr):
    """In float64, the sum of e^(x - m) over the sum that was formed with a rounded c."""
    if WIDE:
        return a
    else:
        finite = tl.where(highest == -float("inf"), 0.0, highest).to(tl.float64)
        off = tl.exp2(c.to(tl.float64) - finite * a.to(tl.float64))
        return tl.where(tl.abs(finite) < float("inf"), off, 1.0)


@triton.jit(do_not_specialize=_CHANGING)
def normalize_kernel(
    logits,
    labels,
    logps,
    normalizers,
    entropies,
    rows,
    length,
    vocabulary,
    row_stride,
    token_stride,
    stride,
    label_row_stride,
    label_stride,
    ignore_index,
    shift,
    first,
    ENTROPY: tl.constexpr,
    WIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    PTX: tl.constexpr,
    LANES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """logps, (m, S) and entropy of one token; 0, (0, 1) and 0 where it has no label.

    `TOGETHER`: neighbours that one thread takes at once; they share a maximum and a sum.
    """
    COMPUTE: tl.constexpr = tl.float64 if WIDE else tl.float32
    GROUPS: tl.constexpr = LANES // TOGETHER
    token = tl.program_id(0).to(tl.int64)
    counted, label = locate(labels, token, length, label_row_stride, label_stride, ignore_index, shift)
    row = logits + (token // length) * row_stride + (token % length) * token_stride
    highest = tl.full([GROUPS], -float("inf"), COMPUTE)
    total = tl.zeros([GROUPS], COMPUTE)
    weighted = tl.zeros([GROUPS], COMPUTE)
    lanes = tl.arange(0, GROUPS)[:, None] * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    for start in range(0, tl.where(counted, vocabulary, 0), LANES):
        v = start + lanes
        x = tl.load(row + v.to(tl.int64) * stride, mask=v < vocabulary, other=-float("inf")).to(COMPUTE)
        most = tl.maximum(highest, tl.max(x, 1))
        a, c = _fold(most, WIDE)
        fall = _fall(highest, a, c, WIDE)
        scale = _power(fall, WIDE, PTX)
        exponent = _exponent(x, a[:, None], c[:, None], WIDE, EMULATE)
        e = _power(exponent, WIDE, PTX)
        if ENTROPY:
            before = tl.where(scale == 0, 0.0, scale * (weighted + fall * total))
            weighted = before + tl.sum(tl.where(e == 0, 0.0, e * exponent), 1)
        total = total * scale + tl.sum(e, 1)
        highest = most
    overall = tl.max(highest, 0)
    a, c = _fold(overall, WIDE)
    fall = _fall(highest, a, c, WIDE)
    scale = _power(fall, WIDE, PTX)
    formed = tl.sum((total * scale).to(tl.float64), 0)
    sum = formed * _correction(overall, a, c, WIDE)
    log_sum = tl.log(sum)
    held = counted & (label >= first) & (label < first + vocabulary)
    own = tl.load(row + (label - first) * stride, mask=held, other=0.0).to(COMPUTE)
    logp = own.to(tl.float64) - overall.to(tl.float64) - log_sum
    elements = rows.to(tl.int64) * length
    tl.store(logps + token, tl.where(held, logp, 0.0).to(COMPUTE))
    tl.store(normalizers + token, tl.where(counted, overall, 0.0))
    tl.store(normalizers + elements + token, tl.where(counted, sum, 1.0).to(COMPUTE))
    if ENTROPY:
        joined = tl.sum(tl.where(scale == 0, 0.0, scale * (weighted + fall * total)).to(tl.float64), 0)
        spread = tl.log(formed) - joined * (1.0 if WIDE else LN_2) / formed
        tl.store(entropies + token, tl.where(counted, spread, 0.0).to(COMPUTE))


@triton.jit(do_not_specialize=_CHANGING)
def slope_kernel(
    logits,
    labels,
    logps,
    normalizers,
    grad,
    slopes,
    rows,
    length,
    vocabulary,
    row_stride,
    token_stride,
    stride,
    slope_row_stride,
    slope_token_stride,
    slope_stride,
    label_row_stride,
    label_stride,
    ignore_index,
    shift,
    first,
    WIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    PTX: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A part of grad * ([v = y] - exp(x_v - m) / S) for one token; 0 where it has no label."""
    COMPUTE: tl.constexpr = tl.float64 if WIDE else tl.float32
    token = tl.program_id(0).to(tl.int64)
    counted, label = locate(labels, token, length, label_row_stride, label_stride, ignore_index, shift)
    from_row = logits + (token // length) * row_stride + (token % length) * token_stride
    to_row = slopes + (token // length) * slope_row_stride + (token % length) * slope_token_stride
    elements = rows.to(tl.int64) * length
    highest, slope = tl.load(normalizers + token), tl.load(grad + token)
    a, c = _fold(highest, WIDE)
    # Without a label nothing is read: -inf, of which the power is 0.
    readable = tl.where(counted, vocabulary, 0)
    factor = -slope / tl.load(normalizers + elements + token)
    factor = tl.where(counted, (factor * _correction(highest, a, c, WIDE)).to(COMPUTE), 0.0)
    begin = tl.program_id(1) * (STEPS * LANES)
    for step in range(STEPS):
        v = begin + step * LANES + tl.arange(0, LANES)
        at = v.to(tl.int64)
        x = tl.load(from_row + at * stride, mask=v < readable, other=-float("inf")).to(COMPUTE)
        result = factor * _power(_exponent(x, a, c, WIDE, EMULATE), WIDE, PTX)
        tl.store(to_row + at * slope_stride, result.to(slopes.dtype.element_ty), mask=v < vocabulary)
    # The label's element is written over by another thread than wrote it: after all have.
    tl.debug_barrier()
    own = label - first
    here = counted & (own >= begin) & (own < tl.minimum(begin + STEPS * LANES, vocabulary))
    # 1 - p without cancellation where p is close to 1.
    at_label = slope.to(tl.float64) * (1.0 - tl.exp(tl.load(logps + token).to(tl.float64)))
    tl.store(to_row + own * slope_stride, at_label.to(COMPUTE).to(slopes.dtype.element_ty), mask=here)


def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: int, first: int, vocabulary: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, held = logits.shape
    wide = logits.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    logps = torch.empty(rows, length, dtype=dtype, device=logits.device)
    normalizers = torch.empty(2, rows, length, dtype=dtype, device=logits.device)
    entropies = torch.empty(rows if entropy else 0, length, dtype=dtype, device=logits.device)
    if logps.numel():
        with torch.cuda.device_of(logits):
            normalize_kernel[(logps.numel(),)](
                logits,
                labels,
                logps,
                normalizers,
                entropies,
                rows,
                length,
                held,
                *logits.stride(),
                *labels.stride(),
                ignore_index,
                shift,
                first,
                ENTROPY=entropy,
                TOGETHER=together(logits.dtype),
                **configuration(wide),
                **arithmetic(logits),
                **OPTIONS,
            )
    return logps, normalizers, entropies


def token_logps_gradient(logits: Tensor, *arguments: Any) -> Tensor:
    slopes = torch.empty_like(logits)
    _put_gradient(logits, slopes, *arguments)
    return slopes


def token_logps_gradient_(logits: Tensor, *arguments: Any) -> None:
    _put_gradient(logits, logits, *arguments)


def _put_gradient(
    logits: Tensor,
    slopes: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    ignore_index: int,
    shift: int,
    first: int,
) -> None:
    """`slopes` may be the logits themselves."""
    if not logits.numel():
        return
    rows, length, held = logits.shape
    config = configuration(logits.dtype == torch.float64)
    with torch.cuda.device_of(logits):
        slope_kernel[(rows * length, triton.cdiv(held, config["LANES"] * STEPS))](
            logits,
            labels,
            logps,
            normalizers,
            grad,
            slopes,
            rows,
            length,
            held,
            *logits.stride(),
            *slopes.stride(),
            *labels.stride(),
            ignore_index,
            shift,
            first,
            STEPS=STEPS,
            **config,
            **arithmetic(logits),
            **OPTIONS,
        )


def configuration(wide: bool) -> dict[str, Any]:
    return {"WIDE": wide, "LANES": LANES[wide]}


def together(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return 16 // dtype.itemsize


def arithmetic(logits: Tensor) -> dict[str, bool]:
    return {"EMULATE": not logits.is_cuda, "PTX": logits.is_cuda and torch.version.hip is None}
