r"""Stochastic rounding of an in-place perturbation to 16-bit weights: right on average, where to nearest is not.

    round(x) = hi with probability (x - lo) / (hi - lo), else lo,        lo <= x <= hi neighbours in the weight's dtype

A perturbation far below the spacing of bfloat16 weights rounds away to nothing; rounded stochastically its expectation
is kept, at the price of noise of about sqrt(|eps| * spacing) in every element (docs/optimizer.md says what that amounts
to). The draws are a hash of a counter, not a generator's: the same on every device, and the same again after a resume.

In plain PyTorch on every backend: only the selected neurons are computed with, about a percent of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 24  # as many as float32's significand, so that a draw is exact; bfloat16 needs 16 of them and float16 13
_MASK = 0xFFFFFFFF
#: The dtypes that it is for: in wider ones nothing is lost.
HALVES = (torch.bfloat16, torch.float16)


class StochasticRounding:
    """The perturbations of one optimizer, counted: each draws numbers of its own.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.draws = 0

    def perturb_(
        self,
        weights: Sequence[Tensor],
        indices: Sequence[Tensor],
        axes: Sequence[int],
        directions: Sequence[Tensor],
        scale: Tensor,
        backups: Sequence[Tensor],
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As :func:`shapo_kernels.ops.perturb_`, but bfloat16 and float16 weights are rounded stochastically."""
        key = _mixed(_mixed(self._seed) ^ self.draws)
        self.draws += 1
        # Every backup is full before anything is written: see InPlace.
        for weight, index, axis, backup in zip(weights, indices, axes, backups, strict=True):
            backup.copy_(weight.index_select(axis, index))
        sums = []
        for layer, (weight, index, axis, direction, s, old) in enumerate(
            zip(weights, indices, axes, directions, scale, backups, strict=True)
        ):
            step = torch.where(s == 0, 0.0, s.to(direction.dtype) * direction)
            new = old.to(direction.dtype) + step
            if weight.dtype in HALVES:
                new = round_stochastically(new, weight.dtype, key=_mixed(key ^ layer))
            new = torch.where(s == 0, old, new.to(weight.dtype))
            weight.index_copy_(axis, index, new)
            computed = compute_dtype or weight.dtype
            moved = new.to(computed).double() - old.to(computed).double()
            sums.append(torch.stack([moved.square().sum(), (moved * step).sum(), old.double().square().sum()]))
        return torch.stack(sums)


def round_stochastically(values: Tensor, dtype: torch.dtype, *, key: int) -> Tensor:
    """float32 ``values`` in bfloat16 or float16, each rounded up or down with the probability that keeps its mean.

    Values that are representable, too large or not finite are rounded as ever.
    """
    nearest = values.to(dtype)
    bits = nearest.view(torch.int16)
    # Sign and magnitude: one less is the next number towards zero, one more the next away from it.
    inside = torch.where(nearest.float().abs() > values.abs(), bits - 1, bits)
    low, high = inside.view(dtype), (inside + 1).view(dtype)
    share = (values - low.float()) / (high.float() - low.float())
    outward = torch.where(share > _uniform(values.shape, key, values.device), high, low)
    exact = (nearest.float() == values) | ~high.isfinite()
    return torch.where(exact, nearest, outward)


def _uniform(shape: torch.Size, key: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), the hash of each element's position and the key."""
    # Positions are mixed before the key comes in: else two keys would give one set of numbers in two orders.
    hashed = _mix(_mix(torch.arange(shape.numel(), device=device)) ^ key)
    return ((hashed >> (32 - _BITS)).float() * 2.0**-_BITS).view(shape)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3, in the low half of int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _mixed(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
