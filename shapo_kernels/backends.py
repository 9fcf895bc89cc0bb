"""The choice between backends: the reference, the C++ CPU kernels, Triton and CUDA C++.

A backend is a namespace of functions with the names and positional arguments of the schemas in `ops/_schemas.py`.
`reference` (plain PyTorch) serves every device and has every operator; `cpu` and `cuda` are the compiled
libraries; `triton` is compiled at run time. By default an operator on CPU tensors is served by `cpu`, on CUDA
tensors by `cuda`, else by `triton`: by the first that is available and has it, else by `reference`.
`SHAPO_BACKEND` or :func:`use` name one backend instead. If it cannot serve a tensor's device that is an error; an
operator that it does not have is served by the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import native, reference
from .interop.torch_private import has_kernel

NAMES = ("reference", "cpu", "triton", "cuda")

_DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

native.load()

# The operators that each backend has. Filled before anything runs: torch.compile traces the lookup, and can trace
# neither an import nor a cache being filled.
_functions: dict[str, dict[str, Callable[..., Any]]] = {}

# A plain global and not a context variable: autograd runs CUDA backward passes on its own threads, which must see it
# too.
_override: str | None = None


def available() -> tuple[str, ...]:
    """Names of the backends that can run here, in the order of `NAMES`."""
    return tuple(name for name in NAMES if why_not_available(name) is None)


def serving(device_type: str) -> str:
    """The name of the backend that serves tensors of a device type (`"cpu"`, `"cuda"`, …).

    Raises:
        ValueError: the backend asked for by `use` or `SHAPO_BACKEND` is unknown or cannot serve that device here.
    """
    return _order(device_type)[0]


def function(device: torch.device, name: str) -> Callable[..., Any]:
    """The operator of that name in the backend that serves a device, or in the next one that has it."""
    found = find(device, name)
    if found is None:
        raise AssertionError(f"the reference has no operator {name!r}")
    return found


def find(device: torch.device, name: str) -> Callable[..., Any] | None:
    """The same, or `None`: of a kernel that does several operators' work, which only some backends have."""
    for backend in _order(device.type):
        if name in _functions[backend]:
            return _functions[backend][name]
    return None


def _order(device_type: str) -> tuple[str, ...]:
    wanted = _override or os.environ.get("SHAPO_BACKEND") or None
    if wanted is None:
        return tuple(name for name in _DEFAULTS.get(device_type, ("reference",)) if name in _functions)
    check_usable(wanted)
    if not _serves(wanted, device_type):
        raise ValueError(
            f"backend {wanted!r} cannot serve tensors on {device_type!r}: move them, or choose 'reference', "
            "which serves every device"
        )
    return wanted, "reference"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Serve every operator by one backend inside the `with` block (for the whole process, all threads).

    Raises:
        ValueError: the name is unknown or the backend is not available here.
    """
    global _override
    check_usable(name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def check_usable(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(NAMES)}")
    reason = why_not_available(name)
    if reason is None:
        _fill(name)
    else:
        raise ValueError(f"backend {name!r} is not available: {reason}; available here: {', '.join(available())}")


def _serves(name: str, device_type: str) -> bool:
    if name == "triton":
        return device_type == "cuda" or (device_type == "cpu" and _interpreting())
    return name == "reference" or name == device_type


def why_not_available(name: str) -> str | None:
    """Why a backend cannot run here, or `None` where it can."""
    if name == "cpu":
        return None if native.has_cpu else native.problems.get("cpu", "the CPU library was not built")
    if name == "cuda":
        if not native.has_cuda:
            return native.problems.get("cuda", "the CUDA library was not built")
        return None if torch.cuda.is_available() else "there is no CUDA device"
    if name == "triton":
        if not _importable(f"{__package__}.triton"):
            return "this version has no Triton kernels"
        if not _importable("triton"):
            return "triton is not installed"
        if not torch.cuda.is_available() and not _interpreting():
            return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _fill(backend: str) -> None:
    if backend in _functions:
        return
    if backend in ("cpu", "cuda"):
        # A schema is registered once, for both libraries: whether one has the operator, its kernel tells.
        _functions[backend] = {
            name: getattr(torch.ops.shapo_kernels, name)
            for name in reference.__all__
            if hasattr(torch.ops.shapo_kernels, name) and has_kernel(f"shapo_kernels::{name}", backend.upper())
        }
    else:
        own = reference if backend == "reference" else importlib.import_module(f"{__package__}.{backend}")
        _functions[backend] = {name: getattr(own, name) for name in own.__all__}


for _name in available():
    _fill(_name)
