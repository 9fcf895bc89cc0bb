"""Adapters that compute with a base weight beside calling its layer, which taps do not see. Where the weight takes
gradients the ascent's graph tells (``weight_uses``); a frozen one leaves no trace there, so PEFT's are known by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_READERS = {"hira": "HiRA", "glora": "GLoRA"}


def reading_base_weights(model: nn.Module) -> dict[int, str]:
    """id of each base layer whose weight its adapter reads, and the adapter's name."""
    named = ((getattr(module, "base_layer", None), _name(module)) for module in model.modules())
    return {id(base): name for base, name in named if base is not None and name is not None}


def _name(module: Any) -> str | None:
    for family, name in _READERS.items():
        if type(module).__module__.startswith(f"peft.tuners.{family}."):
            return name
    dropouts = getattr(module, "lora_dropout", {})
    for adapter, uses_dora in getattr(module, "use_dora", {}).items():
        # Without dropout it takes the base layer's own output, and the weight's norm as a constant.
        if uses_dora and adapter in dropouts and not isinstance(dropouts[adapter], nn.Identity):
            return "DoRA with dropout"
    return None
