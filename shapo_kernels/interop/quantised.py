"""Weights held in another form than they act in: packed or integer (bitsandbytes), tensor subclasses (torchao).

Nothing can be added to them, and they have no gradient. But their layers are linear and of known size, which is all
that the selective ascent and the delta perturbation need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .torch_private import is_dtensor, is_fake


def is_quantised(parameter: Tensor) -> bool:
    """Whether a weight's elements are something else than plain floating-point numbers of 16 bits or more.

    8-bit floats count as quantised: they are stored with a scale. A fake tensor is a plain one without its contents.
    """
    if is_dtensor(parameter):
        return False
    numbers = parameter.is_floating_point() and parameter.element_size() > 1
    return not numbers or not (type(parameter) in (nn.Parameter, Tensor) or is_fake(parameter))


def acting_shape(parameter: Tensor, modules: Sequence[tuple[nn.Module, str]]) -> tuple[int, ...] | None:
    """The shape that a weight acts in: its own; `[out_features, in_features]` where it is quantised and its modules
    are linear layers; None where they are not.
    """
    if not is_quantised(parameter):
        return tuple(parameter.shape) if parameter.is_floating_point() else None
    if not all(attribute == "weight" and is_linear_by_features(module) for module, attribute in modules):
        return None
    layer, _ = modules[0]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def is_linear_by_features(module: nn.Module) -> bool:
    """Whether a layer has `in_features` and `out_features`, as linear layers of any class do."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def compute_dtype_of_quantised(parameter: Tensor) -> torch.dtype:
    """The dtype to measure eps in before the layer has run: what a subclass says of itself, else float32."""
    return parameter.dtype if parameter.is_floating_point() else torch.float32
