"""Values that are computed from a tensor once and kept with it, until the tensor is written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..interop.torch_private import version

T = TypeVar("T")


def remembered(tensor: Tensor, name: str, make: Callable[[], T]) -> T:
    """`make()`, or what it returned the last time for this tensor and version of it."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return make()
    memory = tensor.__dict__.setdefault("_shapo_memory", {})
    then, value = memory.get(name, (None, None))
    if then != version(tensor):
        value = make()
        memory[name] = version(tensor), value
    return value
