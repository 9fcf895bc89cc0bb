"""A tap that lets one layer compute with a weight of its own, where others hold the same parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..interop.torch_private import is_dtensor
from .descent_guard import DescentGuard
from .taps import Tap


class WeightTap(Tap):
    """For a layer whose weight is selected whole: `W + D` takes the weight's place while a direction is at work.

    One product instead of the two of `W x + D x`, for one more weight in memory. The parameter stays where it is, for
    the model and for its other layers, and gradients reach it through `W + D`. Where eps would be lost to rounding
    (16-bit weights or computation), or the weight is gathered for each call, it acts as any tap does.
    """

    _layer: Any = None

    def attach(self, module: nn.Module, guard: DescentGuard) -> RemovableHandle:
        self._layer = module
        return super().attach(module, guard)

    def observe(self, leaf: Tensor) -> None:
        super().observe(leaf)
        if self._takes_its_place():
            # Not the parameter's gradient: the ascent differentiates the direction.
            self._substitute(self._layer.weight.detach() + leaf)

    def add(self, direction: Tensor) -> None:
        super().add(direction)
        if self._takes_its_place():
            with torch.enable_grad():
                self._substitute(self._layer.weight + direction)

    def rest(self) -> None:
        super().rest()
        if self._layer is not None:
            self._layer.__dict__.pop("weight", None)

    def _takes_its_place(self) -> bool:
        weight = self._layer.weight
        wide = (torch.float32, torch.float64)
        return not is_dtensor(weight) and weight.dtype in wide and self.compute_dtype in (None, *wide)

    def _substitute(self, weight: Tensor) -> None:
        # Found before the parameter by who asks for `layer.weight`, and no part of the layer's state. Whoever reads it
        # sees it move, so the layer need not be called.
        self._layer.__dict__["weight"] = weight
        self._direction, self.ran = None, True
