"""Checks that the losses share; they read metadata only and never wait for a device."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor


def check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: expected a finite number above 0")


def check_finite(name: str, value: float) -> None:
    _check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: expected a finite number")


def check_flip_rate(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 <= value < 0.5:
        raise ValueError(f"{name} is {value}: expected a share of flipped labels in [0, 0.5)")


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a Python number")


def check_pairs(**tensors: Tensor) -> torch.dtype:
    """Floating ``[B]`` tensors of one shape on one device; returns the dtype of what is made of them."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        if tensor.dim() != 1:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}: expected [B], one number for each pair")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has {len(tensor)} pairs and {first_name} has {len(first)}: expected as many of each"
            )
        check_device(name, tensor, first_name, first)
    return result_dtype(*tensors.values())


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: expected a tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}: expected a floating-point tensor")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} lies on {tensor.device} and {other_name} on {other.device}: expected one device")


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if one is fp64, else fp32: 16-bit inputs give fp32 results."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_labels(labels: Tensor, name: str, inputs: Tensor) -> None:
    """Integers ``[B, T]`` beside ``inputs``; their values are the operators' to check."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}: expected a tensor")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels is {labels.dtype}: expected an integer tensor, int64 by custom")
    if labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels has the shape {list(labels.shape)}: expected {list(inputs.shape[:2])}, one beside each of {name}"
        )
    check_device("labels", labels, name, inputs)
