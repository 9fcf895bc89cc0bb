"""A GradScaler around an update: an overflow in the ascent skips the update, as one in the descent does.

A scaler looks at `.grad` only, and an ascent leaves nothing there. So where the direction is not finite, one gradient
of the descent is set to NaN: the scaler finds it, skips the step and lowers its scale. Without a scaler the NaN would
reach the weights, so this starts only after one was seen: it reads `_step_supports_amp_scaling` before each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..interop.sharding import local_part

CLOSURE = (
    "a GradScaler steps without closures: call opt.step(closure, scaler=scaler) and then scaler.update(), "
    "or take the passes by `with opt.ascent():` and `with opt.perturbed():` and call scaler.step(opt)"
)


class LossScaling:
    """Whether a scaler is used, which one scaled the ascent, and whether an ascent of this update overflowed."""

    def __init__(self) -> None:
        self._overflow: Tensor | None = None
        self._seen = False
        self.stepping = False
        self._scalers: list[Any] = []

    def begin(self) -> None:
        """Pass 1 begins. Forgets the previous update where a scaler ended it, by a step or by skipping one."""
        self._scalers = []
        if self.stepping:
            self.end()

    def use(self, scaler: Any) -> None:
        """A loss of this ascent is scaled with this scaler, or with none that is known (None).

        Raises:
            RuntimeError: another loss of this ascent is not.
        """
        if self._scalers and self._scalers[0] is not scaler:
            raise RuntimeError("the losses of one ascent are scaled alike: give each ascend() the same scaler")
        self._scalers = [scaler]

    def back_to(self, scaler: Any) -> None:
        """An ascent has failed: the earlier one's losses were scaled with this scaler."""
        self._scalers = [] if scaler is None else [scaler]

    @property
    def scaler(self) -> Any:
        return self._scalers[0] if self._scalers else None

    def unscaled(self, values: list[Tensor]) -> list[Tensor]:
        """The ascent's direction without the scale of its losses, which stays on the device."""
        if self.scaler is None or not values:
            return values
        scale = self.scaler.scale(torch.ones((), device=values[0].device))
        return [value / scale.to(value.dtype) for value in values]

    def record(self, overflow: Tensor) -> None:
        """Notes whether an ascent's norm is not finite: a bool on the device."""
        self._overflow = overflow if self._overflow is None else self._overflow | overflow

    def descended(self, base: Optimizer, groups: Sequence[Any]) -> None:
        """The descent's gradients are complete: shows an overflow to the scaler, if there is one."""
        if self._seen:
            self._show(base, groups)

    def asked(self, base: Optimizer, groups: Sequence[Any]) -> None:
        """A scaler is about to look at the gradients and to step.

        Args:
            groups: the process groups that must agree on an overflow.

        Raises:
            RuntimeError: there are no gradients, so the scaler was given a closure.
        """
        if all(p.grad is None for group in base.param_groups for p in group["params"]):
            raise RuntimeError(CLOSURE)
        self._seen = self.stepping = True
        # A scaler that was told to unscale earlier, to clip, has looked already: step() then asks overflowed().
        self._show(base, groups)

    def overflowed(self) -> bool:
        """Whether a scaler's step must be skipped; waits for the device, as the scaler has done."""
        return self.stepping and self._overflow is not None and bool(self._overflow)

    def end(self) -> None:
        """The update has ended."""
        self._overflow, self.stepping = None, False

    def _show(self, base: Optimizer, groups: Sequence[Any]) -> None:
        if self._overflow is None:
            return
        for group in groups:
            flag = self._overflow.to(torch.uint8)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            self._overflow = flag.bool()
        for parameter in (p for group in base.param_groups for p in group["params"]):
            grad = local_part(parameter.grad)
            if grad is not None and grad.layout == torch.strided and grad.numel():
                factor = torch.where(self._overflow.to(grad.device), torch.nan, 1.0)
                grad.mul_(factor.to(grad.dtype))
                return
