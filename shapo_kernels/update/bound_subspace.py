"""A subspace bound to a model: finds the direction of its neurons with an ascent, moves them along it and back.

It knows no update, no interval and no base optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..ascent import Ascent, GradAscent, SelectiveAscent, other_use
from ..distributed import average, selected_weight_squared_norms, total_over_parts
from ..errors import SubspaceError, warn
from ..interop import fsdp
from ..interop.discovery import check_supported
from ..interop.sharding import ranks_are_known
from ..interop.torch_private import version
from ..model.binding import bind
from ..model.descent_guard import DescentGuard
from ..model.targets import Target
from ..perturbation import Delta, InPlace, Perturbation, StochasticRounding, any_gathered, suits_delta, suits_in_place
from ..reference.rounding import HALVES
from ..subspace import Subspace
from .radius import Radius
from .stats import UpdateStats

#: Some of the targets and, compact, the gradient of each.
Direction: TypeAlias = "tuple[list[Target], list[Tensor]]"


class BoundSubspace:
    """A subspace in a model, with hooks on its layers until :meth:`detach`.

    Args:
        model, subspace, ascent, perturbation, relative, sync: as :class:`shapo_kernels.ShaPOOptimizer` takes them.
        why_no_gradients: why `.grad` does not hold the gradients, if so.
        rounding: how 16-bit weights are rounded in place; to nearest where there is none.

    Raises:
        SubspaceError: the subspace or an option does not fit the model.
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
        why_no_gradients: str | None = None,
        rounding: StochasticRounding | None = None,
    ) -> None:
        self.selective = ascent == "selective"
        self._subspace, self._relative, self._sync = subspace, relative, sync
        self._perturbation, self._rounding, self._why_no_gradients = perturbation, rounding, why_no_gradients
        self.active: Perturbation | None = None
        self._bind(model)

    @torch.inference_mode(False)  # what is made here and below is used again in other updates
    def _bind(self, model: nn.Module) -> None:
        targets = bind(model, self._subspace, delta=self._perturbation == "delta", sync=self._sync)
        if (reason := self._why_not(targets)) is not None:
            raise SubspaceError(reason)
        self.targets, self._model, self._begun = targets, model, False
        self._among_ranks = ranks_are_known()
        self._versions: set[tuple[int, int]] = set()
        self._found, self._missed = False, list[Target]()
        self._measured_in: dict[Target, torch.dtype] = {}
        self._warned = False
        self.guard = DescentGuard(model)
        for target in targets:
            target.attach(self.guard)

    def _why_not(self, targets: Sequence[Target]) -> str | None:
        """Why the options do not fit these weights."""
        needs_gradients = self._perturbation == "in_place" or not self.selective
        if not self.selective and self._why_no_gradients is not None:
            return f"{self._why_no_gradients}: use ascent='selective'"
        if any_gathered(targets) and needs_gradients:
            return "the selected weights are sharded: use ascent='selective' with perturbation='delta' or 'auto'"
        one_use = next((target.name for target in targets if target.one_use), None)
        if one_use is not None and needs_gradients:
            return (
                f"{one_use!r} is perturbed in its own layer only: "
                "use ascent='selective' with perturbation='delta' or 'auto'"
            )
        if one_use is not None and not suits_delta(targets):
            name = next(target.name for target in targets if not target.taps)
            return (
                f"{one_use!r}, in its own layer only, takes a delta, which {name!r} cannot: "
                "select weights of linear layers only"
            )
        quantised = next((target.name for target in targets if target.quantised), None)
        if quantised is not None and (needs_gradients or self._relative):
            return (
                f"{quantised!r} is quantised: it has no gradient, no norm and takes no sum; "
                "use ascent='selective' with perturbation='delta' or 'auto', and relative=False"
            )
        if self._rounding is not None and not any(target.parameter.dtype in HALVES for target in targets):
            return "stochastic_rounding=True, but no selected weight is bfloat16 or float16"
        return None

    @property
    def gathered(self) -> bool:
        """Whether some selected weights are gathered for each forward pass, and sharded between."""
        return any_gathered(self.targets)

    @property
    def quantised(self) -> bool:
        """Whether a selected weight is, which then has no norm."""
        return any(target.quantised for target in self.targets)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that hold selected weights."""
        return [module for target in self.targets for module, _ in target.modules]

    def follow(self, model: nn.Module) -> None:
        """Binds again, as an update begins, where weights were sharded or replaced or ranks have come together since.

        Args:
            model: as it is wrapped by now. Accelerate's `prepare` wraps after the optimizer was made.

        Raises:
            RuntimeError: it cannot be bound any more. UnsupportedLayout: an engine has it that is not supported.
        """
        if not self._begun:
            check_supported(model)
        if self.gathered:
            # Gathered weights change places with their parts all the time; sharded they stay.
            if self._begun:
                return
            fsdp.reshard(self._model)
        if self._among_ranks == ranks_are_known() and not any(target.replaced for target in self.targets):
            return
        self.detach()
        try:
            self._bind(model)
        except ValueError as error:
            raise RuntimeError(
                f"the model was wrapped, moved or converted after the optimizer was made, and {error}; make the "
                "optimizer around the model as it is to be trained"
            ) from error

    # -- the ascent

    def new_ascent(self, parameters: Sequence[nn.Parameter]) -> Ascent:
        """An ascent to begin; `parameters` are all that a backward pass may leave a gradient in."""
        self._begun = True
        self._versions = self._current_versions()
        self._reset_ran()
        kind = SelectiveAscent if self.selective else GradAscent
        return kind(self.targets, parameters, strict=not self._found)

    def settle(self) -> None:
        """The update ends: passes from here on belong to others."""
        self.guard.settle()
        self._reset_ran()

    @torch.inference_mode(False)
    @torch.no_grad()
    def agreed(self, direction: Direction, *, averaged: bool = False) -> Direction:
        """The direction that all ranks move along: every rank brings every target, with or without a gradient.

        Args:
            averaged: it comes from gradients that are reduced already. An ascent's own passes reduce none: only the
                compact direction crosses ranks.

        Raises:
            RuntimeError: a weight was written to during the ascent. UnsupportedLayout: the model is a part of another.
        """
        if not averaged and (changed := self._current_versions() ^ self._versions):
            name = next(target.name for target in self.targets if any(key == id(target) for key, _ in changed))
            raise RuntimeError(
                f"{name!r} was written to during the ascent, and its direction is that of other weights: an optimizer "
                "that steps in backward hooks takes ascent='selective' and no closure"
            )
        found, values = direction
        if self.gathered and not self._found:
            fsdp.check_outermost(self._model)
        self._found = self._found or bool(found)
        self._missed = [target for target in found if not target.ran or target.used_beside_calls]
        layouts = [target.layout for target in self.targets]
        over = [() if averaged else layout.averaged_over for layout in layouts]
        if not any(over) and not any(layout.held_over or layout.computed_over for layout in layouts):
            return direction
        mine = dict(zip(found, values, strict=True))
        return self.targets, average([mine[t] if t in mine else t.zeros() for t in self.targets], over)

    # -- the descent

    @torch.inference_mode(False)
    @torch.no_grad()
    def move(self, direction: Direction, radius: Radius, stats: UpdateStats) -> Tensor | None:
        """To theta + eps, without waiting for the device. Returns whether the norm overflowed, a bool on the device.

        Raises:
            RuntimeError: the model was converted or moved since the ascent, and its direction does not fit any more.
        """
        self.guard.begin()
        targets, values = direction
        if not targets:
            return None
        try:
            return self._move(targets, values, radius, stats)
        except (TypeError, ValueError) as error:
            # Asked in hindsight: an update that goes well pays nothing for it.
            if (changed := _changed(targets, values)) is None:
                raise
            raise RuntimeError(changed) from error

    def _move(self, targets: list[Target], values: list[Tensor], radius: Radius, stats: UpdateStats) -> Tensor:
        self.active = self._choose(targets)
        writes = isinstance(self.active, InPlace)
        weight_squares = None
        if radius.relative or not writes:
            weight_squares = selected_weight_squared_norms(targets)
        squares, scale = radius.scale(targets, values, weight_squares)
        if self._missed and isinstance(self.active, Delta):
            raise RuntimeError(other_use(self._missed[0]))
        self.guard.writes = writes
        self._measured_in = {target: target.forward_dtype for target in targets if self.guard.writes}
        realised = total_over_parts(self.active.apply(targets, values, scale), targets)
        if weight_squares is not None:
            realised = torch.cat([realised[:, :2], weight_squares.unsqueeze(1)], dim=1)
        return ~stats.record(squares, scale, realised)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> str | None:
        """Back to theta, bit for bit. Returns an error message, or `None`, so that no exception in flight is lost."""
        message = None
        if self.active is not None:
            self._warn_of_autocast()
            message = self.active.remove()
            self.active = None
        merged = self.guard.end()
        return message or merged

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, theta, for passes without gradients; on leaving, theta + eps again."""
        if self.active is None:
            yield
            return
        with torch.no_grad(), self.active.set_aside():
            self.guard.set_aside(True)
            try:
                yield
            finally:
                self.guard.set_aside(False)

    def detach(self) -> None:
        """Leaves the model as it was found: restored, without hooks."""
        self.restore()
        for target in self.targets:
            target.detach()

    # -- inside

    def _reset_ran(self) -> None:
        """Resets the taps' `ran` flags."""
        for tap in (tap for target in self.targets for tap in target.taps):
            tap.ran = False

    def _current_versions(self) -> set[tuple[int, int]]:
        """(target, its weight's version), but for weights that an engine gathers."""
        return {(id(target), version(target.parameter)) for target in self.targets if not target.layout.gathered}

    def _warn_of_autocast(self) -> None:
        lower = [(t, d) for t, d in self._measured_in.items() if t.forward_dtype.itemsize < d.itemsize]
        self._measured_in = {}
        if lower and not self._warned:
            self._warned = True
            target, dtype = lower[0]
            warn(
                f"the descent computed {target.name!r} in {target.forward_dtype} and the ascent in {dtype}, in which "
                "the perturbation was chosen and measured: run both under the same autocast, or use "
                "perturbation='delta'"
            )

    def _choose(self, targets: list[Target]) -> Perturbation:
        if self._perturbation == "delta" or any(target.one_use for target in targets):
            return Delta()
        if self._perturbation == "in_place" or suits_in_place(targets) or not suits_delta(targets):
            return InPlace(self._rounding)
        return Delta()


def _changed(targets: Sequence[Target], values: Sequence[Tensor]) -> str | None:
    """The message for a weight that is no longer what its direction was found for."""
    for target, value in zip(targets, values, strict=True):
        weight = target.parameter
        if value.dtype != target.compute_dtype or value.device != weight.device:
            return (
                f"{target.name!r} was converted or moved since the ascent: it is {weight.dtype} on {weight.device}, "
                f"and its direction {value.dtype} on {value.device}; convert a model between updates"
            )
    return None
