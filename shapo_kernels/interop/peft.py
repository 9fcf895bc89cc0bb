"""PEFT: adapters that read a base weight beside calling its layer, and adapters that are switched or merged.

peft is not imported: its layers are recognised by their modules' names and attributes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_READERS = {"hira": "HiRA", "glora": "GLoRA"}


def reading_base_weights(model: nn.Module) -> dict[int, str]:
    """The id of each base layer whose weight its adapter reads, and the adapter's name.

    Taps see only what goes through the layer's call. Where the weight takes gradients, `model.weight_uses` finds the
    other use in the ascent's graph. A frozen weight leaves no trace there, so these adapters are known by name.
    """
    named = ((getattr(module, "base_layer", None), _name(module)) for module in model.modules())
    return {id(base): name for base, name in named if base is not None and name is not None}


def _name(module: Any) -> str | None:
    for family, name in _READERS.items():
        if type(module).__module__.startswith(f"peft.tuners.{family}."):
            return name
    dropouts = getattr(module, "lora_dropout", {})
    for adapter, uses_dora in getattr(module, "use_dora", {}).items():
        # Without dropout DoRA takes the base layer's own output, and the weight's norm as a constant.
        if uses_dora and adapter in dropouts and not isinstance(dropouts[adapter], nn.Identity):
            return "DoRA with dropout"
    return None


class Adapters:
    """Which adapters of a model are on, and which are merged into its weights.

    Args:
        model: `None` for one without adapters.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = () if model is None else model.modules()
        # All layers are switched together, so one of them tells.
        self._layer: Any = next(
            (m for m in modules if isinstance(getattr(type(m), "disable_adapters", None), property)), None
        )

    @property
    def present(self) -> bool:
        return self._layer is not None

    def state(self) -> tuple[Any, ...]:
        """(are they off, the active ones, the merged ones); empty without adapters."""
        layer = self._layer
        if layer is None:
            return ()
        return layer.disable_adapters, tuple(layer.active_adapters), tuple(getattr(layer, "merged_adapters", ()))
