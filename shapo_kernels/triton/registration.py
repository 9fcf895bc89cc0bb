"""Operators around those Triton launchers that a compiled model calls: torch.compile then sees one node and no kernel.

Their schemas are inferred from the functions, which have the arguments of those in ``csrc/register.cpp``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("shapo_triton", "DEF")


def opaque(
    function: Callable[..., Any], fake: Callable[..., Any], *, mutates_args: Sequence[str] = ()
) -> Callable[..., Any]:
    """``torch.ops.shapo_triton.<name>``, run by ``function`` and traced by ``fake``."""
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
    device = "CPU" if os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available() else "CUDA"
    _LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"shapo_triton::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.shapo_triton, name)
