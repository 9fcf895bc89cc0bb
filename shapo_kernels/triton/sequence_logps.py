"""Log-probabilities of labels in Triton; documented in :mod:`shapo_kernels.ops.sequence_logps`.

Forward, a program walks one token's logits and keeps a maximum and a sum for each of its lanes, which are joined at the
end: nothing waits for a reduction on the way, and an element costs one exponential whether or not it is a new maximum.
Backward, a program writes a part of one token's gradient. A label outside of the vocabulary reads nothing; the public
function asserts that there is none.
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


@triton.jit
def locate(labels, token, length, label_row_stride, label_stride, ignore_index, shift):
    """Whether a token has a label, and which."""
    position = token % length + shift
    there = position < length
    at = (token // length) * label_row_stride + position * label_stride
    label = tl.load(labels + at, mask=there, other=0)
    return there & (label != ignore_index), label


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
    LANES: tl.constexpr,
):
    """logps, (m, S) and entropy of one token; 0, (0, 1) and 0 where it has no label."""
    COMPUTE: tl.constexpr = tl.float64 if WIDE else tl.float32
    token = tl.program_id(0).to(tl.int64)
    counted, label = locate(labels, token, length, label_row_stride, label_stride, ignore_index, shift)
    row = logits + (token // length) * row_stride + (token % length) * token_stride
    highest = tl.full([LANES], -float("inf"), COMPUTE)
    total = tl.zeros([LANES], COMPUTE)
    weighted = tl.zeros([LANES], COMPUTE)
    for start in range(0, tl.where(counted, vocabulary, 0), LANES):
        v = start + tl.arange(0, LANES)
        x = tl.load(row + v.to(tl.int64) * stride, mask=v < vocabulary, other=-float("inf")).to(COMPUTE)
        rises = x > highest
        # Equal infinities differ by NaN; lanes that hold nothing but -inf are dropped below.
        e = tl.where(x == highest, 1.0, tl.exp(-tl.abs(x - highest)))
        if ENTROPY:
            risen = e * (weighted - (x - highest) * total)
            weighted = tl.where(
                e == 0, tl.where(rises, 0.0, weighted), tl.where(rises, risen, weighted + e * (x - highest))
            )
        total = tl.where(rises, total * e + 1.0, total + e)
        highest = tl.where(rises, x, highest)
    overall = tl.max(highest, 0)
    scale = tl.where(highest == -float("inf"), 0.0, tl.exp(highest - overall))
    sum = tl.sum((total * scale).to(tl.float64), 0)
    log_sum = tl.log(sum)
    held = counted & (label >= first) & (label < first + vocabulary)
    own = tl.load(row + (label - first) * stride, mask=held, other=0.0).to(COMPUTE)
    logp = own.to(tl.float64) - overall.to(tl.float64) - log_sum
    elements = rows.to(tl.int64) * length
    tl.store(logps + token, tl.where(held, logp, 0.0).to(COMPUTE))
    tl.store(normalizers + token, tl.where(counted, overall, 0.0))
    tl.store(normalizers + elements + token, tl.where(counted, sum, 1.0).to(COMPUTE))
    if ENTROPY:
        fall = tl.where(scale == 0, 0.0, scale * (weighted + (highest - overall) * total))
        spread = log_sum - tl.sum(fall.to(tl.float64), 0) / sum
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
    factor = -slope / tl.load(normalizers + elements + token)
    # 1 - p without cancellation where p is close to 1.
    at_label = (slope.to(tl.float64) * (1.0 - tl.exp(tl.load(logps + token).to(tl.float64)))).to(COMPUTE)
    readable = tl.where(counted, vocabulary, 0)
    for step in range(STEPS):
        v = (tl.program_id(1) * STEPS + step) * LANES + tl.arange(0, LANES)
        there = v < vocabulary
        at = v.to(tl.int64)
        x = tl.load(from_row + at * stride, mask=v < readable, other=-float("inf")).to(COMPUTE)
        result = tl.where(at == label - first, at_label, factor * tl.exp(x - highest))
        result = tl.where(counted, result, 0.0)
        tl.store(to_row + at * slope_stride, result.to(slopes.dtype.element_ty), mask=there)


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
                **configuration(wide),
                **OPTIONS,
            )
    return logps, normalizers, entropies


def token_logps_gradient(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    ignore_index: int,
    shift: int,
    first: int,
) -> Tensor:
    slopes = torch.empty_like(logits)
    _write_gradient(logits, slopes, labels, logps, normalizers, grad, ignore_index, shift, first)
    return slopes


def token_logps_gradient_(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    ignore_index: int,
    shift: int,
    first: int,
) -> None:
    _write_gradient(logits, logits, labels, logps, normalizers, grad, ignore_index, shift, first)


def _write_gradient(
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
            **OPTIONS,
        )


def configuration(wide: bool) -> dict[str, Any]:
    return {"WIDE": wide, "LANES": LANES[wide]}
