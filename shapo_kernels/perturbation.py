"""The perturbation: holding a model at theta + eps, and giving it back as it was.

``InPlace`` writes the selected neurons and keeps their old bits; ``Delta`` writes nothing and lets the taps add the
direction in the forward pass. Both take unscaled compact gradients and one scale for each layer, and report how much
of eps reaches the forward pass in the dtype it computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from . import ops
from .binding import Target, selected_weight_squared_norms, total_over_parts


class Perturbation(Protocol):
    def apply(self, targets: list[Target], values: list[Tensor], scale: Tensor) -> Tensor:
        """Move to theta + scale * values.

        Returns float64 ``[n, 3]`` as :func:`shapo_kernels.ops.perturb_` does, of whole weights: a collective where
        ranks hold parts of them.
        """

    def remove(self) -> None:
        """Back to theta, bit for bit; nothing to do where nothing is applied."""


class InPlace:
    """W[:, S] += eps, the old columns kept compact and written back."""

    def __init__(self) -> None:
        self._targets: list[Target] = []
        self._backups: list[Tensor] = []
        self._written = False
        self._mark: Tensor | None = None
        self._guards: list[torch.utils.hooks.RemovableHandle] = []

    def apply(self, targets: list[Target], values: list[Tensor], scale: Tensor) -> Tensor:
        weights = [target.weight() for target in targets]
        backups = [target.buffer("backup", weight.dtype) for target, weight in zip(targets, weights, strict=True)]
        # An interrupt is delivered when the operator returns, before its caller can note that it ran. The mark tells
        # then: it is gone once the backups are filled.
        self._mark = next((b.view(-1)[0] for b in backups if b.numel()), None)
        if self._mark is not None:
            self._mark.fill_(torch.nan)
        self._targets, self._backups, self._written = targets, backups, False
        for target in targets:
            for module, _ in target.modules:
                self._guards.append(module.register_state_dict_pre_hook(_refuse_state_dict))
        realised = ops.perturb_(
            weights,
            [target.index for target in targets],
            [target.axis for target in targets],
            values,
            scale,
            backups,
            compute_dtype=_lower_compute_dtype(targets),
        )
        self._written = True
        return total_over_parts(realised, targets)

    def remove(self) -> None:
        if self._targets and (self._written or (self._mark is not None and not bool(self._mark.isnan()))):
            try:
                self._restore()
            except KeyboardInterrupt:
                self._restore()  # writing the same bits twice does no harm; leaving them unwritten would
                raise
        self._targets, self._backups, self._written = [], [], False
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def _restore(self) -> None:
        targets = self._targets
        ops.restore_(
            [t.weight() for t in targets], [t.index for t in targets], [t.axis for t in targets], self._backups
        )


class Delta:
    """y = W x + D x[..., S]: eps lives in the taps and the weight is never written."""

    def __init__(self) -> None:
        self._targets: list[Target] = []

    def apply(self, targets: list[Target], values: list[Tensor], scale: Tensor) -> Tensor:
        weight_squares = selected_weight_squared_norms(targets)
        self._targets = targets
        rows = []
        for target, value, s in zip(targets, values, scale, strict=True):
            # A scale of 0 means no perturbation, also where the gradient is NaN or infinite.
            eps = torch.where(s == 0, 0.0, value * s.to(value.dtype))
            for tap in target.taps:
                tap.add(eps)
            realised = eps.to(_compute_dtype(target)).double()
            rows.append(torch.stack([realised.square().sum(), (realised * eps).sum()]))
        return torch.cat([total_over_parts(torch.stack(rows), targets), weight_squares.unsqueeze(1)], dim=1)

    def remove(self) -> None:
        for target in self._targets:
            for tap in target.taps:
                tap.rest()
        self._targets = []


def suits_in_place(targets: Sequence[Target]) -> bool:
    """Whether there are weights to write to, and they and computation wide enough for eps: the rule of ``auto``."""
    wide = (torch.float32, torch.float64)
    return not any_gathered(targets) and all(
        target.parameter.dtype in wide and _compute_dtype(target) in wide for target in targets
    )


def any_gathered(targets: Sequence[Target]) -> bool:
    return any(target.layout.gathered for target in targets)


def suits_delta(targets: Sequence[Target]) -> bool:
    return all(target.taps for target in targets)


def _compute_dtype(target: Target) -> torch.dtype:
    """The dtype that the target's layers were last seen to compute in; its own where they have not run."""
    return next((tap.compute_dtype for tap in target.taps if tap.compute_dtype is not None), target.parameter.dtype)


def _lower_compute_dtype(targets: Sequence[Target]) -> torch.dtype | None:
    """The one dtype that all layers compute in where it is not their weights' own (autocast), else ``None``."""
    found = {_compute_dtype(target) for target in targets if target.taps}
    return found.pop() if len(found) == 1 else None


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        f"the weights of {prefix.rstrip('.') or type(module).__name__!r} are perturbed at this moment: "
        "take the state_dict outside `with opt.perturbed():`, or call opt.restore() first"
    )
