"""The selected neurons of one model: how their direction is found, and how they are moved along it and back.

This module knows of no update, no interval and no base optimizer; see :mod:`shapo_kernels.optimizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from . import ops
from .ascent import Ascent, GradAscent, SelectiveAscent
from .binding import Target, attach, bind, detach, selected_weight_squared_norms
from .distributed import average
from .perturbation import Delta, InPlace, Perturbation, any_sharded, suits_delta, suits_in_place
from .radius import Radii
from .stats import UpdateStats
from .subspace import Subspace

#: Some of the targets and, compact, the gradient of each.
Direction: TypeAlias = "tuple[list[Target], list[Tensor]]"


class Perturber:
    """A subspace bound to a model, with hooks on its layers until :meth:`detach`.

    Args:
        model, subspace, ascent, perturbation: as :class:`shapo_kernels.ShaPOOptimizer` takes them.

    Raises:
        SubspaceError: the subspace does not fit the model. ValueError: the options do not fit sharded weights.
    """

    def __init__(self, model: nn.Module, subspace: Subspace, *, ascent: str, perturbation: str) -> None:
        self.targets = bind(model, subspace, delta=perturbation == "delta")
        if self.sharded and (perturbation == "in_place" or ascent == "grad"):
            raise ValueError(
                "the selected weights are sharded: use ascent='selective' with perturbation='delta' or 'auto'"
            )
        self.selective = ascent == "selective"
        self._perturbation = perturbation
        self.active: Perturbation | None = None
        attach(self.targets)

    @property
    def sharded(self) -> bool:
        """Whether some selected weights are held in parts by several ranks."""
        return any_sharded(self.targets)

    def new_ascent(self, parameters: Sequence[nn.Parameter]) -> Ascent:
        """An ascent to begin; ``parameters`` are all that a backward pass may leave a gradient in."""
        return SelectiveAscent(self.targets) if self.selective else GradAscent(self.targets, parameters)

    @torch.no_grad()
    def agreed(self, direction: Direction, groups: Sequence[Any]) -> Direction:
        """The direction that all ranks move along: every rank brings every target, whether it has a gradient or not."""
        if not groups:
            return direction
        held = dict(zip(*direction, strict=True))
        complete = [
            held.get(t, torch.zeros(t.compact_shape, dtype=t.compute_dtype, device=t.parameter.device))
            for t in self.targets
        ]
        return list(self.targets), average(complete, groups)

    @torch.no_grad()
    def move(
        self, direction: Direction, radii: Radii, stats: UpdateStats, *, norm: str, relative: bool, eta: float
    ) -> None:
        """To theta + eps, without waiting for the device."""
        targets, values = direction
        if not targets:
            return
        weight_squares = selected_weight_squared_norms(targets) if relative else None
        squares, scale = ops.norms_and_scale(
            values, radii.of(targets), weight_squared_norms=weight_squares, norm=norm, eta=eta
        )
        self.active = self._choose(targets)
        realised = self.active.apply(targets, values, scale)
        stats.record(squares, scale, realised)

    @torch.no_grad()
    def restore(self) -> None:
        """Back to theta, bit for bit; does nothing where nothing is perturbed."""
        if self.active is not None:
            self.active.remove()
            self.active = None

    def detach(self) -> None:
        """Leave the model as it was found: restored, without hooks."""
        self.restore()
        detach(self.targets)

    def _choose(self, targets: list[Target]) -> Perturbation:
        if self._perturbation == "delta":
            return Delta()
        if self._perturbation == "in_place" or suits_in_place(targets) or not suits_delta(targets):
            return InPlace()
        return Delta()
