"""`python -m shapo_kernels`: what is installed here, what was built, and which backend serves which device."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, backends, native


def main() -> None:
    for line in report():
        print(line)


def report() -> list[str]:
    """The lines that belong into a bug report."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = [
        f"shapo-kernels      {__version__}",
        f"python             {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch              {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton             {_version('triton')}",
        f"transformers       {_version('transformers')}",
        f"cpu library        {_library('cpu', native.cpu_library)}",
        f"cuda library       {_library('cuda', native.cuda_library)}",
        f"cuda architectures {native.cuda_architectures() or 'none'}",
        f"backends           {', '.join(backends.available())}",
    ]
    for device in devices:
        lines.append(f"{device:<5}is served by  {_serving(device)}")
    if not torch.cuda.is_available():
        lines.append("cuda is served by  nothing: there is no CUDA device")
    return lines


def _serving(device: str) -> str:
    try:
        return backends.serving(device)
    except ValueError as error:  # SHAPO_BACKEND names one that cannot
        return f"nothing: {error}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library(name: str, path: object) -> str:
    problem = native.problems.get(name)
    return f"not in use: {problem}" if problem else f"loaded from {path}"


if __name__ == "__main__":
    main()
