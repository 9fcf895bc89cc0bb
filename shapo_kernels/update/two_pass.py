"""The two passes of an update, in each of its forms: contexts, a closure, by hand.

:class:`TwoPassUpdate` holds what lives from one pass to the next: the phase, the direction, the random state, the loss
scale. It knows no interval and no learning rate; see `optimizer` for those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ascent import Ascent, check_gradients_possible, clear_gradients, gather_gradients
from .base import Base
from .bound_subspace import BoundSubspace, Direction
from .loss_scaling import LossScaling
from .phase import Phase, PhaseError, Progress
from .prefix import Prefix
from .radius import Radius
from .random_state import RandomState
from .stats import UpdateStats
from .training import no_gradient, warn_of_untrained

_NOTHING_HANDED_OVER = (
    "`with opt.ascent():` was left without a loss: hand it over by opt.ascend(loss), which takes the place of "
    "loss.backward()"
)
_CLOSURE_WITHOUT_BACKWARD = (
    "the closure left the model no gradient, at theta{where}: it must clear gradients, compute this model's loss, call "
    "loss.backward() and return the loss"
)
_DESCENT_WITHOUT_BACKWARD = (
    "the descent left no gradient, so there is nothing to step with: call loss.backward() inside "
    "`with opt.perturbed():`, and clear gradients after opt.step()"
)


class TwoPassUpdate:
    """One update at a time.

    Args:
        model: as the optimizer was given it.
        bound: the subspace in that model.
        base: takes the steps.
        radius, stats: of the perturbation.
        prefix: the blocks below the selected layers, where the descent reuses them.
        sync: the direction is the same on all data-parallel ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        bound: BoundSubspace,
        base: Base,
        radius: Radius,
        stats: UpdateStats,
        prefix: Prefix,
        *,
        sync: bool,
    ) -> None:
        self.bound, self.scaling, self.prefix = bound, LossScaling(), prefix
        #: As it is wrapped by now.
        self.model = model
        self._base, self._radius, self._stats, self._sync = base, radius, stats, sync
        self._progress = Progress()
        self._ascent: Ascent | None = None
        self._handed_over = self._by_hand = False
        self._random: RandomState | None = None
        #: The direction of the ascent that the next descent moves along.
        self.direction: Direction | None = None

    @property
    def phase(self) -> Phase:
        return self._progress.phase

    @property
    def check_between_passes(self) -> Callable[[str], None]:
        return self._progress.check_between_passes

    def check_complete(self) -> None:
        """Raises where the update has not had both passes, or its descent left nothing to step with.

        By hand the gradients are the caller's own: SAM loops may have none, and that update is then plain.
        """
        self._progress.check_complete()
        if not self._by_hand and no_gradient(self.model, _of_groups(self._base)):
            raise RuntimeError(_DESCENT_WITHOUT_BACKWARD)

    # -- pass 1

    @contextlib.contextmanager
    def ascent(self, *, replay_rng: bool) -> Iterator[None]:
        """Forward passes inside belong to the ascent; their losses go to :meth:`ascend`."""
        with self._pass_one(selective=self.bound.selective, replay_rng=replay_rng) as ascent:
            self._ascent, self._handed_over = ascent, False
            try:
                yield
            finally:
                self._ascent = None
            if not self._handed_over and ascent.is_empty:
                raise RuntimeError(_NOTHING_HANDED_OVER)

    def ascend(self, loss: Tensor, scaler: Any) -> None:
        if self._ascent is None:
            raise PhaseError("ascend() is part of an ascent: call it inside `with opt.ascent():`")
        self.scaling.use(scaler)
        self._handed_over = True
        self.prefix.look_at(loss, self._ascent.leaves())
        self._ascent.ascend(loss if scaler is None else scaler.scale(loss))

    @contextlib.contextmanager
    def _pass_one(self, *, selective: bool, replay_rng: bool) -> Iterator[Ascent]:
        """Sets the direction on leaving; an exception leaves phase and direction as they were."""
        self.check_between_passes("start an ascent")
        before, random, scaler = self.phase, self._random, self.scaling.scaler
        self._begin(replay_rng)
        self._by_hand = False
        ascent = self.bound.new_ascent(self._parameters())
        ascent.begin()
        self._progress.enter(Phase.ASCENDING)
        after, done = before, False
        try:
            self.prefix.begin_ascent(self.model, self.bound.layers, selective=selective)
            with self._base.without_reduction(self.model, selective=selective):
                yield ascent
            if self.phase is Phase.DETACHED:
                self._progress.enter(Phase.ASCENDED)  # raises
            self.direction = self.bound.agreed(ascent.finish())
            self.prefix.end_ascent()
            after, done = Phase.ASCENDED, True
        finally:
            if not done:
                # An earlier direction stays; its blocks are not reused.
                self.prefix.abort()
                self._random = random
                self.scaling.back_to(scaler)
            ascent.abort()
            if self.phase is not Phase.DETACHED:
                self._progress.enter(after)

    # -- pass 2

    @contextlib.contextmanager
    def descent(self) -> Iterator[None]:
        """At theta + eps inside; at theta on leaving, by an exception too."""
        direction, self.direction = self.direction, None
        if direction is None:
            raise PhaseError("this update is due and has no direction: run `with opt.ascent(): opt.ascend(loss)` first")
        message = None
        after = Phase.IDLE
        try:
            self._move(direction)
            yield
            self.prefix.check_calls()
            after = Phase.DESCENDED
        finally:
            message = self._come_back(after)
        _raise_any(message)

    @contextlib.contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Inside a descent, theta again, for passes without gradients."""
        with torch.no_grad(), self.bound.set_aside():
            yield

    # -- all of it

    def run(self, closure: Callable[[], Any], scaler: Any, *, replay_rng: bool) -> Any:
        """Both passes by a closure. Returns the first pass's loss."""
        with torch.enable_grad():
            with self._pass_one(selective=False, replay_rng=replay_rng) as ascent:
                self.scaling.use(scaler)
                loss = closure()
                self.prefix.look_at(loss, ascent.leaves())
                ascent.collect(loss)
                if ascent.is_empty and no_gradient(self.model, self._parameters()):
                    raise RuntimeError(_CLOSURE_WITHOUT_BACKWARD.format(where=""))
            parameters = self._parameters()
            clear_gradients(parameters)
            with self.descent():
                closure()
                if no_gradient(self.model, parameters):
                    raise RuntimeError(_CLOSURE_WITHOUT_BACKWARD.format(where=" + eps"))
            self.prefix.check()
        return loss

    def run_plain(self, closure: Callable[[], Any]) -> Any:
        """A plain update's one pass."""
        self.scaling.begin()
        with torch.enable_grad():
            return closure()

    # -- by hand

    def perturb(self, *, due: bool, replay_rng: bool, clear: bool) -> None:
        """To theta + eps along the ascent's direction, else along `.grad`, which is then cleared for pass 2."""
        self.check_between_passes("perturb")
        direction = self.direction
        if direction is None:
            if due:
                direction = self._direction_from_gradients(replay_rng)
            if clear:
                clear_gradients(self._parameters())
        self.direction = None
        if direction is None:
            return
        try:
            self._move(direction)
        except BaseException:
            self._come_back(Phase.IDLE)
            raise

    def restore(self) -> None:
        """Back to theta, bit for bit; does nothing where nothing is perturbed."""
        _raise_any(self._come_back(Phase.DESCENDED))

    def _direction_from_gradients(self, replay_rng: bool) -> Direction:
        self._begin(replay_rng)
        self._by_hand = True
        if (reason := self._base.why_no_gradients) is not None:
            raise RuntimeError(f"{reason}: use `with opt.ascent():` instead")
        if self.bound.gathered:
            raise RuntimeError("the selected weights are sharded: use `with opt.ascent():` or a closure instead")
        if any(target.one_use for target in self.bound.targets):
            raise RuntimeError(
                "a weight is perturbed in one layer only, and .grad holds the gradient of all its layers: "
                "use `with opt.ascent():` or a closure instead"
            )
        if replay_rng:
            raise RuntimeError(
                "replay_rng=True must see pass 1 begin: use `with opt.ascent():` or a closure, "
                "or make a sk.RandomState before pass 1 and restore() it before pass 2"
            )
        targets = self.bound.targets
        found = gather_gradients(targets)
        if not found[0] and not any(target.parameter.requires_grad for target in targets):
            check_gradients_possible(targets)
        return self.bound.agreed(found, averaged=True)

    # -- its life

    def finish(self) -> None:
        """The end of an update."""
        self.scaling.end()
        self.bound.settle()
        self.prefix.abort()
        self.direction = self._random = None
        if self.phase is not Phase.DETACHED:
            self._progress.enter(Phase.IDLE)

    def forget(self) -> None:
        """Drops a direction that was found before a state was loaded."""
        self.direction = None
        self.prefix.abort()
        if self.phase is not Phase.DETACHED:
            self._progress.enter(Phase.IDLE)

    def detach(self) -> None:
        """Restores the model and takes the hooks off it."""
        self.prefix.abort()
        self.bound.detach()
        if self.phase is not Phase.DETACHED:
            self._progress.enter(Phase.DETACHED)

    # -- for a GradScaler

    def scaler_asks(self) -> None:
        """A GradScaler is about to look at the gradients."""
        if (
            self._radius.norm == "none"
            and self.phase in (Phase.ASCENDED, Phase.DESCENDED)
            and self.scaling.scaler is None
        ):
            raise RuntimeError(
                "norm='none' takes the gradient as it is, and a GradScaler's is scaled: "
                "call opt.ascend(loss, scaler=scaler) or opt.step(closure, scaler=scaler)"
            )
        self.scaling.asked(self._base.optimizer, self._scaling_groups())

    def _scaling_groups(self) -> list[Any]:
        """Ranks that must agree on an overflow: all of them, unless the direction is common to them already."""
        return [] if self._sync or not dist.is_available() or not dist.is_initialized() else [dist.group.WORLD]

    # -- inside

    def _begin(self, replay_rng: bool) -> None:
        """The start of pass 1."""
        if self.phase is Phase.DETACHED:
            self._progress.enter(Phase.ASCENDING)  # raises
        bound_before = self.bound.targets
        self.bound.follow(self.model)
        if self.bound.targets is not bound_before:
            warn_of_untrained(self._base, bound_before, self.bound.targets)
        self.scaling.begin()
        self.prefix.abort()
        self.bound.guard.settle()
        self._random = RandomState(self.model) if replay_rng else None

    def _move(self, direction: Direction) -> None:
        self._progress.enter(Phase.DESCENDING)
        targets, values = direction
        overflow = self.bound.move((targets, self.scaling.unscaled(values)), self._radius, self._stats)
        if overflow is not None:
            self.scaling.record(overflow)
        if self._random is not None:
            self._random.restore()
        self.prefix.begin_descent()

    def _come_back(self, after: Phase) -> str | None:
        """Restores without replacing an exception in flight: returns an error message, or `None`."""
        if self.phase is not Phase.DESCENDING:
            return None
        message = self.bound.restore()
        self._progress.enter(after)
        self.prefix.end_descent()
        if after is Phase.IDLE:
            self.prefix.abort()
        self.scaling.descended(self._base.optimizer, self._scaling_groups())
        return message

    def _parameters(self) -> list[nn.Parameter]:
        """Every parameter that a backward pass may leave a gradient in: the model's and the base optimizer's."""
        found = {id(p): p for p in self.model.parameters()}
        found.update({id(p): p for p in _of_groups(self._base)})
        return list(found.values())


def _of_groups(base: Base) -> Iterator[nn.Parameter]:
    return (parameter for group in base.optimizer.param_groups for parameter in group["params"])


def _raise_any(message: str | None) -> None:
    if message is not None:
        raise RuntimeError(message)
