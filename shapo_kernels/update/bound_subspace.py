"""The selected neurons of one model: how their direction is found, and how they are moved along it and back.

This module knows of no update, no interval and no base optimizer; see :mod:`shapo_kernels.optimizer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .. import ops
from ..ascent import Ascent, GradAscent, SelectiveAscent, refuse_other_use
from ..distributed import average
from ..interop.deepspeed import is_engine
from ..interop.sharding import ranks_are_known, refuse_deepspeed, refuse_inner, reshard
from ..model.descent_guard import Watch
from ..model.targets import (
    Target,
    attach,
    bind,
    complete,
    detach,
    selected_weight_squared_norms,
    total_over_parts,
)
from ..perturbation import Delta, InPlace, Perturbation, any_gathered, suits_delta, suits_in_place
from ..stochastic_rounding import HALVES, StochasticRounding
from ..subspace import Subspace, SubspaceError
from .radius import Radii
from .stats import UpdateStats

#: Some of the targets and, compact, the gradient of each.
Direction: TypeAlias = "tuple[list[Target], list[Tensor]]"


class Perturber:
    """A subspace bound to a model, with hooks on its layers until :meth:`detach`.

    Args:
        model, subspace, ascent, perturbation, relative, sync: as :class:`shapo_kernels.ShaPOOptimizer` takes them.
        rounding: how 16-bit weights are rounded in place; to nearest where there is none.

    Raises:
        SubspaceError: the subspace does not fit the model, or the options do not fit quantised weights.
        ValueError: the options do not fit sharded weights.
    """

    def __init__(
        self,
        model: nn.Module,
        subspace: Subspace,
        *,
        ascent: str,
        perturbation: str,
        relative: bool,
        sync: bool,
        rounding: StochasticRounding | None = None,
    ) -> None:
        self._subspace, self._relative, self._sync = subspace, relative, sync
        self.selective = ascent == "selective"
        self._rounding = rounding
        self._perturbation = perturbation
        self.active: Perturbation | None = None
        self._bind(model)

    @torch.inference_mode(False)  # what is made here and below is used again in other updates
    def _bind(self, model: nn.Module) -> None:
        targets = bind(model, self._subspace, delta=self._perturbation == "delta", sync=self._sync)
        if is_engine(model) and not self.selective:
            raise ValueError("DeepSpeed keeps the gradients in partitions of its own: use ascent='selective'")
        if any_gathered(targets) and (self._perturbation == "in_place" or not self.selective):
            raise ValueError(
                "the selected weights are sharded: use ascent='selective' with perturbation='delta' or 'auto'"
            )
        quantised = next((target.name for target in targets if target.quantised), None)
        if quantised is not None and (self._perturbation == "in_place" or not self.selective or self._relative):
            raise SubspaceError(
                f"{quantised!r} is quantised: it has no gradient, no norm and takes no sum; "
                "use ascent='selective' with perturbation='delta' or 'auto', and relative=False"
            )
        if self._rounding is not None and not any(target.parameter.dtype in HALVES for target in targets):
            raise ValueError("stochastic_rounding=True, but no selected weight is bfloat16 or float16")
        self.targets, self._model, self._begun = targets, model, False
        self._among_ranks = ranks_are_known()
        self._versions: set[tuple[int, int]] = set()
        self._found, self._missed = False, list[Target]()
        self._measured_in: dict[Target, torch.dtype] = {}
        self._warned = False
        self.watch = Watch(model)
        attach(targets, self.watch)

    @property
    def gathered(self) -> bool:
        """Whether some selected weights are whole in a forward pass only, and gathered for it."""
        return any_gathered(self.targets)

    def follow(self, model: nn.Module) -> None:
        """Bind again what was sharded or replaced since, as Accelerate's ``prepare`` does, or where ranks have come
        together since; asked as an update begins.

        Args:
            model: as it is wrapped by now.

        Raises:
            RuntimeError: it cannot be bound any more. UnsupportedLayout: DeepSpeed has it.
        """
        if not self._begun:
            refuse_deepspeed(model)
        if self.gathered:
            # Gathered weights change places with their parts all the time; sharded they stay.
            if self._begun:
                return
            reshard(self._model)
        if self._among_ranks == ranks_are_known() and not any(target.replaced for target in self.targets):
            return
        self.detach()
        try:
            self._bind(model)
        except ValueError as error:
            raise RuntimeError(
                f"the model was wrapped after the optimizer was made, and {error}; make the optimizer around the "
                "wrapped model"
            ) from error

    def new_ascent(self, parameters: Sequence[nn.Parameter]) -> Ascent:
        """An ascent to begin; ``parameters`` are all that a backward pass may leave a gradient in."""
        self._begun = True
        self._versions = self._current_versions()
        self.settle()
        kind = SelectiveAscent if self.selective else GradAscent
        return kind(self.targets, parameters, strict=not self._found)

    def settle(self) -> None:
        """An ascent begins, or the update ends: what has run is of no account any more."""
        for tap in (tap for target in self.targets for tap in target.taps):
            tap.ran = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def agreed(self, direction: Direction, *, averaged: bool = False) -> Direction:
        """The direction that all ranks move along: every rank brings every target, whether it has a gradient or not.

        Args:
            averaged: it was found in gradients that somebody has reduced. An ascent's own passes reduce none: only the
                compact direction crosses ranks, if anything does.

        Raises:
            RuntimeError: a weight was written to during the ascent. UnsupportedLayout: the model is a part of another.
        """
        if not averaged and (changed := self._current_versions() ^ self._versions):
            name = next(target.name for target in self.targets if any(key == id(target) for key, _ in changed))
            raise RuntimeError(
                f"{name!r} was written to during the ascent, and its direction is that of other weights: an optimizer "
                "that steps in backward hooks takes ascent='selective' and no closure"
            )
        found, _ = direction
        if self.gathered and not self._found:
            refuse_inner(self._model)
        self._found = self._found or bool(found)
        self._missed = [target for target in found if not target.ran or target.used_beside_calls]
        layouts = [target.layout for target in self.targets]
        over = [() if averaged else layout.averaged_over for layout in layouts]
        if not any(over) and not any(layout.held_over or layout.computed_over for layout in layouts):
            return direction
        return self.targets, average(complete(self.targets, *direction), over)

    @torch.inference_mode(False)
    @torch.no_grad()
    def move(
        self, direction: Direction, radii: Radii, stats: UpdateStats, *, norm: str, relative: bool, eta: float
    ) -> Tensor | None:
        """To theta + eps, without waiting for the device. Returns whether the norm overflowed, a bool on the device."""
        self.watch.begin()
        targets, values = direction
        if not targets:
            return None
        weight_squares = selected_weight_squared_norms(targets) if relative else None
        if any(target.layout.computed_over for target in targets):
            squares = total_over_parts(ops.squared_norms(values), targets)
            scale = ops.perturbation_scale(
                squares, radii.of(targets), weight_squared_norms=weight_squares, norm=norm, eta=eta
            )
        else:
            squares, scale = ops.norms_and_scale(
                values, radii.of(targets), weight_squared_norms=weight_squares, norm=norm, eta=eta
            )
        self.active = self._choose(targets)
        if self._missed and isinstance(self.active, Delta):
            refuse_other_use(self._missed[0])
        self.watch.writes = isinstance(self.active, InPlace)
        self._measured_in = {target: target.forward_dtype for target in targets if self.watch.writes}
        realised = self.active.apply(targets, values, scale)
        return ~stats.record(squares, scale, realised)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> str | None:
        """Back to theta, bit for bit; does nothing where nothing is perturbed. Returns what is amiss, if anything."""
        amiss = None
        if self.active is not None:
            self._warn_of_autocast()
            amiss = self.active.remove() or self.watch.merged()
            self.active = None
        self.watch.end()
        return amiss

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, theta, for passes without gradients; on leaving, theta + eps again."""
        if self.active is None:
            yield
            return
        with torch.no_grad(), self.active.set_aside():
            self.watch.set_aside(True)
            try:
                yield
            finally:
                self.watch.set_aside(False)

    def detach(self) -> None:
        """Leave the model as it was found: restored, without hooks."""
        self.restore()
        detach(self.targets)

    def _current_versions(self) -> set[tuple[int, int]]:
        """(target, its weight's version), but for weights that an engine gathers, or that have no versions."""
        return {
            (id(target), target.parameter._version)
            for target in self.targets
            if not target.layout.gathered and not target.parameter.is_inference()
        }

    def _warn_of_autocast(self) -> None:
        lower = [(t, d) for t, d in self._measured_in.items() if t.forward_dtype.itemsize < d.itemsize]
        self._measured_in = {}
        if lower and not self._warned:
            self._warned = True
            target, dtype = lower[0]
            warnings.warn(
                f"the descent computed {target.name!r} in {target.forward_dtype} and the ascent in {dtype}, in which "
                "the perturbation was chosen and measured: run both under the same autocast, or use "
                "perturbation='delta'",
                stacklevel=2,
            )

    def _choose(self, targets: list[Target]) -> Perturbation:
        if self._perturbation == "delta":
            return Delta()
        if self._perturbation == "in_place" or suits_in_place(targets) or not suits_delta(targets):
            return InPlace(self._rounding)
        return Delta()
