"""Matrix products of 16-bit factors into float32: on CUDA without a rounding in between, elsewhere by casting."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`. 16-bit factors are multiplied into it directly on CUDA; elsewhere the product is cast."""
    if a.dtype != dtype and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, where `total` may be wider than the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _adds_to_wider(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(multiply(a, b, total.dtype))


@functools.cache
def _adds_to_wider(device: torch.device) -> bool:
    """Whether `addmm(out_dtype=)` takes 16-bit factors and a float32 sum.

    No CPU does. On CUDA, PyTorch raised "self and mat2 must have the same dtype" before pytorch/pytorch#167931.
    """
    factor = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = factor.float()
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def unit_of(factors: Tensor) -> Tensor | None:
    """A power of two near the largest of some factors, in which float16 has room for the small ones; None of none."""
    if not factors.numel():
        return None
    largest = factors.abs().amax()
    unit = torch.exp2(torch.frexp(largest).exponent.to(factors.dtype))
    return torch.where(largest.isfinite() & (largest > 0), unit, 1.0)


def put_product_(to: Tensor, a: Tensor, b: Tensor, *, add: bool, rows: int, unit: Tensor | None = None) -> None:
    """`to = a @ b`, or `to += a @ b`, rounded once; by `rows` at a time where that takes a copy.

    Args:
        unit: what the product is multiplied with, of a `to` wider than the factors.
    """
    if add and to.dtype == a.dtype:
        to.addmm_(a, b)
    elif to.dtype == a.dtype:
        torch.mm(a, b, out=to)
    else:
        for start in range(0, len(to), rows):
            part = slice(start, start + rows)
            product = multiply(a[part], b, to.dtype)
            if unit is not None:
                product.mul_(unit)
            if add:
                to[part] += product
            else:
                to[part] = product
