"""Checks that the operators share; they read metadata only and never wait for a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, tensors: Sequence[Tensor]) -> None:
    for position, tensor in enumerate(tensors):
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}[{position}] is {tensor.dtype}: expected float32, bfloat16, float16 or float64")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{position}] is {tensor.layout}: expected a dense tensor (torch.strided)")


def check_same_device(name: str, tensors: Sequence[Tensor]) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{name} and their companions lie on {found}: expected one device")


def check_lengths(lists: Mapping[str, Sequence[Any]]) -> None:
    lengths = {name: len(items) for name, items in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"got {found}: expected as many of each")


def check_first_order(name: str, instead: str) -> None:
    """Called in a backward pass that autograd could not differentiate: refuses ``create_graph=True``.

    torch's ``once_differentiable`` raises only where the incoming gradient has a graph of its own, and else leaves
    terms of the second derivative out in silence. Compiled backward passes refuse second derivatives themselves.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} can be differentiated once, so not with create_graph=True: {instead}")
