"""Operators around the Triton launchers that a compiled model calls: torch.compile then sees one node, no kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..ops._schemas import OPERATORS

_LIBRARY = torch.library.Library("shapo_triton", "DEF")


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.ops.shapo_triton.<name>`, run by `function`; schema and fake are those of the operator of its name."""
    operator = OPERATORS[function.__name__]
    _LIBRARY.define(operator.name + operator.signature)
    device = "CPU" if os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available() else "CUDA"
    _LIBRARY.impl(operator.name, function, device)
    torch.library.register_fake(f"shapo_triton::{operator.name}", operator.fake, lib=_LIBRARY)
    return getattr(torch.ops.shapo_triton, operator.name)
