"""Loads the compiled libraries, which register their operators as `torch.ops.shapo_kernels.*`; calls none of them.

If a library is missing, the reference serves instead; so it does if one cannot be loaded, which is reported once.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def _find(name: str) -> Path | None:
    path = _FOLDER / f"libshapo_{name}.so"
    return path if path.exists() else None


cpu_library: Path | None = _find("cpu")
cuda_library: Path | None = _find("cuda")
has_cpu = False
has_cuda = False
#: Why a library is not in use: "cpu" or "cuda" -> one line.
problems: dict[str, str] = {}
_loaded = False


def load() -> None:
    """Load the libraries that are there, once. The schemas live in the CPU library, so that CUDA's needs it."""
    global has_cpu, has_cuda, _loaded
    if _loaded:
        return
    _loaded = True
    has_cpu = _load("cpu", cpu_library)
    if cuda_library is not None and torch.version.cuda is None:
        problems["cuda"] = f"torch {torch.__version__} is built without CUDA"
    elif cuda_library is not None and not has_cpu:
        problems["cuda"] = "it needs the CPU library"
    else:
        has_cuda = _load("cuda", cuda_library)


def cuda_architectures() -> str:
    """The architectures that the CUDA library was compiled for, as given to CMake; empty where there is none."""
    path = _FOLDER / "cuda_architectures.txt"
    return path.read_text().strip() if path.exists() else ""


def _load(name: str, path: Path | None) -> bool:
    if path is None:
        problems[name] = f"the {name.upper()} library was not built"
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        problems[name] = f"{path.name} cannot be loaded: {reason}"
        warnings.warn(
            f"shapo_kernels: {problems[name]}; its operators run slower, in other backends. Reinstall to rebuild it.",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True
