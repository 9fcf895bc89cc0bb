"""Stochastic rounding to 16 bits; documented at :func:`shapo_kernels.ops.perturb_`.

The draws are hashes of counters and not a generator's, so that they are the same on every device and after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The dtypes that it is for. A wider dtype loses nothing.
HALVES = (torch.bfloat16, torch.float16)

_BITS = 24  # as many as float32's significand, so that a draw is exact; bfloat16 needs 16 of them and float16 13
_MASK = 0xFFFFFFFF


def round_stochastically(values: Tensor, dtype: torch.dtype, *, key: int) -> Tensor:
    """float32 `values` in bfloat16 or float16, each rounded up or down with the probability that keeps its mean.

    Values that are representable, too large or not finite are rounded to nearest.
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


def mixed(x: int) -> int:
    """The 32-bit finaliser of MurmurHash3, of a number."""
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _uniform(shape: torch.Size, key: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), the hash of each element's position and the key."""
    # Positions are mixed before the key comes in: else two keys would give one set of numbers in two orders.
    hashed = _mix(_mix(torch.arange(shape.numel(), device=device)) ^ (key & _MASK))
    return ((hashed >> (32 - _BITS)).float() * 2.0**-_BITS).view(shape)


def _mix(x: Tensor) -> Tensor:
    """The same, in the low half of int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
