"""Undocumented parts of bitsandbytes."""

from __future__ import annotations

from typing import Any

LINEAR4BIT = {
    "support_avx512bf16_for_cpu": "whether a call in eval mode may pack the weight for inference, from then on without "
    "a gradient of the input"
}


def keep_differentiable(model: Any) -> None:
    """Keeps a CPU's 4-bit layers as training needs them.

    With AVX512-BF16 the first call in eval mode packs a weight for inference, and later backward passes silently end
    there. Where a release lacks the switch, nothing is packed, or a test fails by this name.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
