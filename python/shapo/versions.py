"""The versions that a number may depend on."""

from __future__ import annotations

import platform

import torch
import transformers

import shapo_kernels


def versions() -> dict[str, str]:
    """What a number may depend on."""
    return {
        "shapo_kernels": shapo_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, threads: {torch.get_num_threads()}",
    }
