"""Matrix products of 16-bit factors into float32: on CUDA without a rounding in between, elsewhere by casting."""

from __future__ import annotations

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
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def put_product_(to: Tensor, a: Tensor, b: Tensor, *, add: bool, rows: int) -> None:
    """`to = a @ b`, or `to += a @ b`, rounded once; by `rows` at a time where that takes a copy."""
    if add and to.dtype == a.dtype:
        to.addmm_(a, b)
    elif to.dtype == a.dtype:
        torch.mm(a, b, out=to)
    else:
        for start in range(0, len(to), rows):
            part = slice(start, start + rows)
            product = multiply(a[part], b, to.dtype)
            if add:
                to[part] += product
            else:
                to[part] = product
