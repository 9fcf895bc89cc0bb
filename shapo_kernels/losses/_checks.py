"""Checks of pairs and their parameters, shared by the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._checks import (
    check_choice,
    check_device,
    check_finite,
    check_floating,
    check_not_negative,
    check_number,
    check_positive,
    check_tensor,
)

__all__ = [
    "check_choice",
    "check_device",
    "check_finite",
    "check_flip_rate",
    "check_floating",
    "check_not_negative",
    "check_pairs",
    "check_positive",
    "check_tensor",
    "result_dtype",
]


def check_flip_rate(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < 0.5:
        raise ValueError(f"{name} is {value}: expected a share of flipped labels in [0, 0.5)")


def check_pairs(**tensors: Tensor) -> torch.dtype:
    """Floating `[B]` tensors of one shape on one device; returns the dtype of the result."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        if tensor.dim() != 1:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [B], one number for each pair")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has {len(tensor)} pairs and {first_name} has {len(first)}: expected as many of each"
            )
        check_device(name, tensor, first_name, first)
    return result_dtype(*tensors.values())


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one is float64, else float32: 16-bit inputs give float32 results."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
