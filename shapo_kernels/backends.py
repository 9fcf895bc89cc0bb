"""Who serves which device: the choice between the reference, the C++ CPU kernels, Triton and CUDA C++.

A backend is a namespace of functions with the names and positional arguments of the schemas in ``csrc/register.cpp``.
``reference`` (plain PyTorch) serves every device; ``cpu`` and ``cuda`` are the compiled libraries; ``triton`` is
compiled at run time. By default CPU tensors go to ``cpu`` and CUDA tensors to ``cuda``, else ``triton``, else
``reference``. ``SHAPO_BACKEND`` or :func:`use` name one instead; a backend that cannot serve a tensor's device is then
an error, never a silent substitute.
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

NAMES = ("reference", "cpu", "triton", "cuda")

_DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

native.load()

# Filled before anything runs: torch.compile traces the lookup, and can trace neither an import nor a cache being
# filled.
_functions: dict[str, dict[str, Callable[..., Any]]] = {}

# A plain global and no context variable: autograd runs CUDA backward passes on threads of its own, which must see it
# too.
_override: str | None = None


def available() -> tuple[str, ...]:
    """Names of the backends that can run here, in the order of ``NAMES``."""
    return tuple(name for name in NAMES if _unavailable(name) is None)


def serving(device_type: str) -> str:
    """The name of the backend that serves tensors of a device type (``"cpu"``, ``"cuda"``, …).

    Raises:
        ValueError: the backend asked for by ``use`` or ``SHAPO_BACKEND`` is unknown or cannot serve that device here.
    """
    wanted = _override or os.environ.get("SHAPO_BACKEND") or None
    if wanted is not None:
        _check_usable(wanted)
        if not _serves(wanted, device_type):
            raise ValueError(
                f"backend {wanted!r} cannot serve tensors on {device_type!r}: move them, or choose 'reference', "
                "which serves every device"
            )
        return wanted
    for name in _DEFAULTS.get(device_type, ("reference",)):
        if _unavailable(name) is None:
            return name
    return "reference"


def function(device: torch.device, name: str) -> Callable[..., Any]:
    """The function of that name in the backend that serves a device.

    What a backend leaves to PyTorch (the compiled CPU library has no neuron update of its own) the reference serves.
    """
    return _functions[serving(device.type)][name]


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Serve every operator by one backend inside the ``with`` block (for the whole process, all threads).

    Raises:
        ValueError: the name is unknown or the backend is not available here.
    """
    global _override
    _check_usable(name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def _check_usable(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(NAMES)}")
    reason = _unavailable(name)
    if reason is None:
        _fill(name)
    else:
        raise ValueError(f"backend {name!r} is not available: {reason}; available here: {', '.join(available())}")


def _serves(name: str, device_type: str) -> bool:
    if name == "triton":
        return device_type == "cuda" or (device_type == "cpu" and _interpreting())
    return name == "reference" or name == device_type


def _unavailable(name: str) -> str | None:
    """Why a backend cannot run here, or ``None`` where it can."""
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
    compiled = backend in ("cpu", "cuda")
    own = torch.ops.shapo_kernels if compiled else importlib.import_module(f"{__package__}.{backend}")
    _functions[backend] = {
        # Every schema is registered once, for both libraries: whether one has the operator, its kernel tells.
        name: getattr(own, name, getattr(reference, name))
        if not compiled or torch._C._dispatch_has_kernel_for_dispatch_key(f"shapo_kernels::{name}", backend.upper())
        else getattr(reference, name)
        for name in reference.__all__
    }


for _name in available():
    _fill(_name)
