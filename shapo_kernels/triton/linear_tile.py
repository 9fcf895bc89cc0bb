"""A tile of the head's logits in one launch, forward or backward; formulas in :mod:`shapo_kernels.ops.linear_head`.

The product before it writes the tile, the product after it reads what this kernel makes of it. A program has one
token's part of the vocabulary. Forward it walks that twice: for the maximum and the sum, which it joins to those of the
tiles before, and to write the factors; the second walk finds in the caches what the first has read. Backward it walks
it once. The sum over the tiles before is scaled for those tokens only whose maximum rose, which is rare after the first
tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sequence_logps import LN_2, OPTIONS, _correction, _exponent, _fall, _fold, _power, arithmetic, together

# Rows of a token's state, all float64.
HIGHEST, SUM, LABEL, WEIGHTED, LOGITS, BEST, ARGMAX = (tl.constexpr(row) for row in range(7))


@triton.jit
def _logits(row, bias, v, columns, scale, softcap, BIASED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """`cap((x + bias) * scale)`; -inf beyond the tile."""
    x = tl.load(row + v, mask=v < columns, other=-float("inf"))
    if BIASED:
        x += tl.load(bias + v, mask=v < columns, other=0.0).to(tl.float32)
    if SCALED:
        x *= scale
    if CAPPED:
        # tanh by one exponential; its infinity gives 1.
        capped = softcap * (1.0 - 2.0 / (1.0 + tl.exp(x * (2.0 / softcap))))
        x = tl.where(v < columns, capped, -float("inf"))
    return x


@triton.jit
def _shrink(below, above):
    """e^(below - above), 1 where both are the same infinity."""
    return tl.where(below == above, 1.0, tl.exp(below - above))


@triton.jit
def _off(highest, a, c, EMULATE: tl.constexpr):
    """`_correction` in float32: what rounding left of c is exact by one fused multiply-add."""
    if EMULATE:
        return _correction(highest, a, c, False).to(tl.float32)
    else:
        finite = tl.where(tl.abs(highest) < float("inf"), highest, 0.0)
        return tl.where(finite == highest, tl.exp2(tl.fma(-finite, a, c)), 1.0)


@triton.jit(
    do_not_specialize=["tokens", "first", "per_token_stride", "scale", "softcap"],
    do_not_specialize_on_alignment=["targets", "per_token", "state"],
)
def tile_kernel(
    tile,
    factors,
    targets,
    bias,
    state,
    per_token,
    sums,
    tokens,
    columns,
    width,
    first,
    per_token_stride,
    scale,
    softcap,
    SEE: tl.constexpr,
    LAST: tl.constexpr,
    WRITE: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    STATISTICS: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    EMULATE: tl.constexpr,
    PTX: tl.constexpr,
    LANES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """`SEE`: join the tile to `state`, the label's logit apart. `LAST`: finish `per_token` with that.

    `WRITE` factors: `scale ([v = y] - p_v) bend` of the last tile and of one that is not seen, whose `per_token` is
    there; of the others `e^(x - highest) bend`, without the label.
    """
    GROUPS: tl.constexpr = LANES // TOGETHER
    token = tl.program_id(0).to(tl.int64)
    row = tile + token * columns
    own = tl.load(targets + token) - first
    here = (own >= 0) & (own < columns)
    at = tl.where(here, own, columns).to(tl.int32)
    label = _logits(row, bias, at, columns, scale, softcap, BIASED, SCALED, CAPPED)
    lanes = tl.arange(0, GROUPS)[:, None] * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    if SEE:
        highest = tl.full([GROUPS], -float("inf"), tl.float32)
        total = tl.zeros([GROUPS], tl.float32)
        if STATISTICS:
            weighted, added = tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
            best, where = tl.full([GROUPS], -float("inf"), tl.float32), tl.zeros([GROUPS], tl.int32)
        for start in range(0, columns, LANES):
            v = start + lanes
            x = _logits(row, bias, v, columns, scale, softcap, BIASED, SCALED, CAPPED)
            if STATISTICS:
                added += tl.sum(tl.where(v < columns, x, 0.0), 1)
                most = tl.max(x, 1)
                where = tl.where(most > best, tl.min(tl.where(x == most[:, None], v, columns), 1), where)
                best = tl.maximum(best, most)
            x = tl.where(v == at, -float("inf"), x)
            most = tl.maximum(highest, tl.max(x, 1))
            a, c = _fold(most, False)
            fall = _fall(highest, a, c, False)
            shrunk = _power(fall, False, PTX)
            exponent = _exponent(x, a[:, None], c[:, None], False, EMULATE)
            e = _power(exponent, False, PTX)
            if STATISTICS:
                before = tl.where(shrunk == 0, 0.0, shrunk * (weighted + fall * total))
                weighted = before + tl.sum(tl.where(e == 0, 0.0, e * exponent), 1)
            total = total * shrunk + tl.sum(e, 1)
            highest = most
        overall = tl.max(highest, 0)
        a, c = _fold(overall, False)
        fall = _fall(highest, a, c, False)
        shrunk = _power(fall, False, PTX)
        formed = tl.sum(total * shrunk, 0)
        correction = _off(overall, a, c, EMULATE)
        mine = state + token
        before, sum_before = tl.load(mine).to(tl.float32), tl.load(mine + SUM * tokens)
        now = tl.maximum(before, overall)
        old, new = _shrink(before, now), _shrink(overall, now)
        sum = sum_before * old + (formed * correction).to(tl.float64) * new
        label_now = tl.where(here, label.to(tl.float64), tl.load(mine + LABEL * tokens))
        if STATISTICS:
            joined = tl.sum(tl.where(shrunk == 0, 0.0, shrunk * (weighted + fall * total)), 0)
            own_weighted = correction * (LN_2 * joined + tl.log(correction) * formed)
            fell = tl.where(old == 0, 0.0, old * (tl.load(mine + WEIGHTED * tokens) + tl.log(old) * sum_before))
            rose = tl.where(new == 0, 0.0, new * (own_weighted + tl.log(new) * formed * correction))
            most_likely = tl.max(best, 0)
            place = tl.min(tl.where(best == most_likely, where, columns), 0) + first
            best_before, place_before = tl.load(mine + BEST * tokens), tl.load(mine + ARGMAX * tokens)
            better = most_likely.to(tl.float64) > best_before
            added_before = tl.load(mine + LOGITS * tokens)
        # Every thread has read the state, and the label's logit, before one writes.
        tl.debug_barrier()
        tl.store(mine, now.to(tl.float64))
        tl.store(mine + SUM * tokens, sum)
        tl.store(mine + LABEL * tokens, label_now)
        if STATISTICS:
            tl.store(mine + WEIGHTED * tokens, fell + rose)
            tl.store(mine + LOGITS * tokens, added_before + tl.sum(added.to(tl.float64), 0))
            tl.store(mine + BEST * tokens, tl.where(better, most_likely.to(tl.float64), best_before))
            tl.store(mine + ARGMAX * tokens, tl.where(better, place.to(tl.float64), place_before))
        ratio = old
        if LAST:
            top = now.to(tl.float64)
            # log(1 + e^d), d of all others' log-sum-exp above the label; d may be large, or e^d far below 1.
            d = (top - label_now) + tl.log(sum)
            w = tl.exp(-tl.abs(d))
            one = 1.0 + w
            log_one = tl.log(one) + (w - (one - 1.0))  # what one has lost of w
            logp = tl.where(label_now == float("inf"), float("nan"), -(tl.where(d > 0, d, 0.0) + log_one))
            largest = tl.maximum(top, label_now)
            whole = (sum * tl.exp(top - largest) + tl.exp(label_now - largest)).to(tl.float32)
            now = largest.to(tl.float32)
            ratio = -scale * _shrink(before, now) / whole
            tl.store(per_token + token, logp.to(tl.float32))
            tl.store(per_token + per_token_stride + token, now)
            tl.store(per_token + 2 * per_token_stride + token, whole)
        if SCALE_SUMS:
            for start in range(0, tl.where(ratio == 1.0, 0, width), LANES):
                h = start + tl.arange(0, LANES)
                sum_at = sums + token * width + h
                tl.store(sum_at, tl.load(sum_at, mask=h < width) * ratio, mask=h < width)
    if WRITE:
        times, at_label = tl.full([], 1.0, tl.float32), tl.zeros([], tl.float32)
        if LAST:
            times, at_label = -scale / whole, scale * (1.0 - tl.exp(logp)).to(tl.float32)
        elif not SEE:
            now = tl.load(per_token + per_token_stride + token)
            times = -scale / tl.load(per_token + 2 * per_token_stride + token)
            if here:
                at_label = scale * (1.0 - tl.exp(tl.load(per_token + token).to(tl.float64))).to(tl.float32)
        a, c = _fold(now, False)
        times *= _off(now, a, c, EMULATE)
        if CAPPED:
            inverse = 1.0 / softcap
            at_label *= 1.0 - (label * inverse) * (label * inverse)
        # The factors may lie over the logits.
        tl.debug_barrier()
        to = factors + token * columns
        for start in range(0, columns, LANES):
            v = start + lanes
            x = _logits(row, bias, v, columns, scale, softcap, BIASED, SCALED, CAPPED)
            slope = times * _power(_exponent(x, a, c, False, EMULATE), False, PTX)
            if CAPPED:
                slope *= 1.0 - (x * inverse) * (x * inverse)
            tl.store(to + v, slope.to(factors.dtype.element_ty), mask=v < columns)
        tl.debug_barrier()
        tl.store(to + at, tl.cast(at_label, factors.dtype.element_ty), mask=here)


def linear_tile(
    tile: Tensor,
    factors: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    first: int,
    scale: float,
    softcap: float | None,
    per_token: Tensor,
    state: Tensor | None = None,
    sums: Tensor | None = None,
    *,
    last: bool = False,
    statistics: bool = False,
) -> None:
    """See :class:`shapo_kernels.ops.linear_walk.FusedWalk`, which calls it.

    Args:
        tile: float32 `[n, columns]`, contiguous: products, to which bias, scale and soft cap are applied here.
        factors: what is made of them, in the dtype of the next product and maybe in the tile's memory; `None` for none.
        targets: int64 `[n]`; `first` is the vocabulary's index of the first column.
        per_token: float32 `[3, n]`, rows contiguous: log p, maximum, sum of exponentials; read without `state`,
            written if this is the `last` tile.
        state: float64 `[7, n]`, the rows named above, contiguous; `None` backward.
        sums: float32 `[n, width]`, contiguous, over the tiles before: scaled to what this tile adds to them.
    """
    tokens, columns = tile.shape
    if not tile.numel():
        return
    with torch.cuda.device_of(tile):
        tile_kernel[(tokens,)](
            tile,
            tile if factors is None else factors,
            targets,
            tile if bias is None else bias,
            tile if state is None else state,
            per_token,
            tile if sums is None else sums,
            tokens,
            columns,
            0 if sums is None else sums.shape[1],
            first,
            per_token.stride(0),
            scale,
            softcap or 1.0,
            SEE=state is not None,
            LAST=last,
            WRITE=factors is not None,
            SCALE_SUMS=sums is not None,
            STATISTICS=statistics,
            BIASED=bias is not None,
            SCALED=scale != 1,
            CAPPED=softcap is not None,
            TOGETHER=together(tile.dtype),
            **arithmetic(tile),
            **configuration(columns),
        )


def configuration(columns: int) -> dict[str, Any]:
    """A thread takes 16 elements at a time. Few warps for short rows, since each repeats what is done once a token."""
    warps = 1 << min(3, max(0, (columns // 1024).bit_length() - 1))
    return {**OPTIONS, "LANES": 512 * warps, "num_warps": warps}
