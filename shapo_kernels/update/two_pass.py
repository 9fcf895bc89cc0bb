"""A ShaPO update, pass by pass, in each of its forms: contexts, a closure, by hand.

What an update leaves alone is told here too: gradients that were there before an ascent, the weights after a descent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..ascent import Ascent, clear_gradients, gather_gradients, refuse_absence
from ..distributed import without_reduction
from ..interop.deepspeed import EngineStep
from .base import OptimizerWrapper
from .bound_subspace import Direction, Perturber
from .loss_scaling import CLOSURE, LossScaling
from .radius import Radii
from .random_state import RandomState
from .stats import UpdateStats

_NOTHING_HANDED_OVER = (
    "`with opt.ascent():` was left without a loss: hand it over by opt.ascend(loss), which takes the place of "
    "loss.backward()"
)


class TwoPassUpdate(OptimizerWrapper):
    """The forms of an update; :class:`shapo_kernels.ShaPOOptimizer` makes one and says what its options are."""

    model: nn.Module
    interval: int
    norm: str
    relative: bool
    sync: bool
    eta: float
    replay_rng: bool
    _perturber: Perturber
    _radii: Radii
    _stats: UpdateStats
    _scaling: LossScaling
    _updates: int
    _ascended: bool
    _ascending: Ascent | None
    _handed_over: bool
    _detached: bool
    _direction: Direction | None
    _random: RandomState | None

    @property
    def due(self) -> bool:
        """Whether the coming update is a ShaPO update: every ``interval``-th one, while any radius is above 0."""
        return (self._updates + 1) % self.interval == 0 and self._radii.any_positive()

    @property
    def updates(self) -> int:
        """How many updates have been taken."""
        return self._updates

    @property
    def is_perturbed(self) -> bool:
        """Whether the model is at theta + eps at this moment: in pass 2, which a closure cannot tell by itself."""
        return self._perturber.watch.lasts

    # -- by contexts

    @contextlib.contextmanager
    def ascent(self) -> Iterator[None]:
        """Pass 1: forward passes inside belong to the ascent; hand their losses to :meth:`ascend`.

        In an update that is not due everything inside is ordinary and ``ascend`` does nothing: ask ``due`` first to
        save the forward pass.

        A second ascent before the descent replaces the first one's direction.

        Raises:
            RuntimeError: inside another ascent, or while perturbed; on leaving, where no loss was handed over.
        """
        self._require_between_passes("start an ascent")
        if not self.due:
            yield
            return
        self._begin()
        ascent = self._perturber.new_ascent(self._parameters())
        ascent.begin()
        self._ascending, self._handed_over = ascent, False
        try:
            with without_reduction(self.model, selective=self._perturber.selective):
                yield
            found = ascent.finish()
            if not self._handed_over and not found[0]:
                raise RuntimeError(_NOTHING_HANDED_OVER)
            self._direction = self._perturber.agreed(found)
            self._ascended = True
        finally:
            ascent.abort()
            self._ascending = None

    def ascend(self, loss: Tensor, *, scaler: Any = None) -> None:
        """Add one (micro-)batch's loss to the ascent; the sum over all calls is what the direction is the gradient of.

        Divide each loss by the number of micro-batches where the losses are means.

        Args:
            loss: a scalar.
            scaler: a ``torch.amp.GradScaler`` to scale it with, so that float16 gradients do not underflow; the
                direction is unscaled again. A loss that is scaled already does as well where the direction is
                normalised.

        Raises:
            RuntimeError: outside :meth:`ascent`; a loss without a graph, or one that no selected neuron took part in.
        """
        if self._ascending is None:
            if not self.due:
                return
            raise RuntimeError("ascend() is part of an ascent: call it inside `with opt.ascent():`")
        self._scaling.use(scaler)
        self._handed_over = True
        self._ascending.ascend(loss if scaler is None else scaler.scale(loss))

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Pass 2: inside, the model is at theta + eps; on leaving, by an exception too, at theta bit for bit.

        Forward and backward passes both belong inside. In a plain update it does nothing.

        Raises:
            RuntimeError: the update is due and there was no ascent; already perturbed.
        """
        self._require_between_passes("perturb")
        if self._direction is None:
            if self.due:
                raise RuntimeError(
                    "this update is due and has no direction: run `with opt.ascent(): opt.ascend(loss)` first"
                )
            yield
            return
        amiss = None
        try:
            self._move(self._direction)
            yield
        except BaseException:
            self._ascended = False
            raise
        finally:
            self._direction = None
            amiss = self._come_back()
        _complain_of(amiss)

    @contextlib.contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Inside a descent, theta again for a while, for passes without gradients: those of a reference model that
        shares the policy's weights, as an adapter's does. Elsewhere it does nothing but turn gradients off.
        """
        with torch.no_grad(), self._perturber.set_aside():
            yield

    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:
        """The base optimizer's step, which ends the update.

        Args:
            closure: clears gradients, computes the loss, calls ``backward`` and returns the loss. With it the whole
                update is run: the closure twice where the update is due, once otherwise.
            scaler: the ``torch.amp.GradScaler`` that the closure scales its loss with; it is asked to step.

        Returns:
            The first pass's loss, or what the base's step returns.

        Raises:
            RuntimeError: while perturbed or inside an ascent; the update is due, has a learning rate above 0 and there
                was no ascent, or no descent after it; a closure by way of ``scaler.step``. TypeError: a scaler without
                a closure.
        """
        if isinstance(self.base, EngineStep):
            return self._step_engine(self.base, closure, scaler)
        self._require_between_passes("step")
        if closure is not None:
            return self._step_with(closure, scaler)
        if scaler is not None:
            raise TypeError("a scaler is given to step() beside a closure; without one, call scaler.step(opt)")
        if self._creates_state():
            return self.base.step()
        self._require_ascent()
        if self._scaling.overflowed():
            self._finish()
            return None
        loss = self.base.step()
        self._updates += 1
        self._finish()
        return loss

    def _step_engine(self, engine: EngineStep, closure: Any, scaler: Any) -> None:
        if closure is not None or scaler is not None:
            raise TypeError(
                "DeepSpeed's engine takes gradients by engine.backward(loss) and scales losses itself: use "
                "`with opt.ascent():` and `with opt.perturbed():`, then opt.step() without a closure or scaler"
            )
        if engine.stepped:  # as Accelerate's backward() does, before the loop asks for a step
            return
        if engine.accumulating:
            engine.count()
            return
        if self.is_perturbed:
            self._direction = None
            _complain_of(self._come_back())
        self._require_between_passes("step")
        self._require_ascent()
        self._updates += engine.step()
        self._finish()

    def _step_with(self, closure: Callable[[], Any], scaler: Any) -> Any:
        passes = self._two_passes if self.due else self._one_pass
        if scaler is not None:
            loss = passes(closure, scaler)
            scaler.step(self)
            return loss
        if self._scaling.stepping:
            raise RuntimeError(CLOSURE)
        loss = self.base.step(lambda: passes(closure, None))
        self._updates += 1
        self._finish()
        return loss

    # -- by hand

    @torch.inference_mode(False)
    @torch.no_grad()
    def perturb(self) -> None:
        """Move to theta + eps along an ascent's direction, else along ``.grad``, which is cleared for pass 2.

        In an update that is not due only ``.grad`` is cleared.

        Raises:
            RuntimeError: already perturbed; without an ascent and with ``replay_rng=True``, or sharded weights.
        """
        self._require_between_passes("perturb")
        direction = self._direction
        if direction is None:
            if self.due:
                direction = self._direction_from_gradients()
            clear_gradients(self._parameters())
        self._direction = None
        if direction is None:
            return
        try:
            self._move(direction)
        except BaseException:
            self._come_back()
            raise

    def restore(self) -> None:
        """Back to theta, bit for bit; does nothing where nothing is perturbed.

        Raises:
            RuntimeError: somebody else wrote to the weights while they were perturbed in place; they are restored.
        """
        _complain_of(self._come_back())

    def first_step(self, zero_grad: bool = True) -> None:
        """:meth:`perturb` under the name that SAM implementations use; ``.grad`` is cleared in any case."""
        self.perturb()

    def second_step(self, zero_grad: bool = False) -> None:
        """:meth:`restore` and :meth:`step` under the name that SAM implementations use."""
        self.restore()
        self.step()
        if zero_grad:
            self.zero_grad()

    # -- inside

    def _come_back(self) -> str | None:
        """:meth:`restore`, which an exception that is under way must not be replaced by: returns what is amiss."""
        if not self.is_perturbed:
            return None
        amiss = self._perturber.restore()
        self._scaling.descended(self.base, self._scaling_groups())
        return amiss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler asks this before it unscales and steps. It must do both by itself: a fused base would look for
        # its factors on the wrong object.
        if self.norm == "none" and self._ascended and self._scaling.scaler is None:
            raise RuntimeError(
                "norm='none' takes the gradient as it is, and a GradScaler's is scaled: "
                "call opt.ascend(loss, scaler=scaler) or opt.step(closure, scaler=scaler)"
            )
        self._scaling.asked(self.base, self._scaling_groups())
        return False

    def _scaling_groups(self) -> list[Any]:
        """Ranks that must agree on an overflow: all of them, where the direction is not their common one already."""
        return [] if self.sync or not dist.is_available() or not dist.is_initialized() else [dist.group.WORLD]

    def _begin(self) -> None:
        """The start of pass 1."""
        if self._detached:
            raise RuntimeError("this optimizer was detached from its model: make a new one around its base")
        self._perturber.follow(self.model)
        self._scaling.begin()
        self._perturber.watch.settle()
        self._random = RandomState(self.model) if self.replay_rng else None

    def _finish(self) -> None:
        """The end of an update."""
        self._scaling.end()
        self._perturber.watch.settle()
        self._perturber.settle()
        self._ascended, self._direction, self._random = False, None, None

    def _one_pass(self, closure: Callable[[], Any], scaler: Any) -> Any:
        self._scaling.begin()
        with torch.enable_grad():
            return closure()

    def _two_passes(self, closure: Callable[[], Any], scaler: Any) -> Any:
        self._begin()
        self._scaling.use(scaler)
        ascent = self._perturber.new_ascent(self._parameters())
        with torch.enable_grad():
            ascent.begin()
            try:
                with without_reduction(self.model, selective=False):
                    loss = closure()
                ascent.collect(loss)
                direction = self._perturber.agreed(ascent.finish())
            finally:
                ascent.abort()
            clear_gradients(self._parameters())
            amiss = None
            try:
                self._move(direction)
                closure()
                self._ascended = True
            finally:
                amiss = self._come_back()
            _complain_of(amiss)
        return loss

    def _direction_from_gradients(self) -> Direction:
        self._begin()
        if isinstance(self.base, EngineStep):
            raise RuntimeError(
                "DeepSpeed keeps the gradients in partitions of its own: use `with opt.ascent():` instead"
            )
        if self._perturber.gathered:
            raise RuntimeError("the selected weights are sharded: use `with opt.ascent():` or a closure instead")
        if self.replay_rng:
            raise RuntimeError(
                "replay_rng=True must see pass 1 begin: use `with opt.ascent():` or a closure, "
                "or make a sk.RandomState before pass 1 and restore() it before pass 2"
            )
        self._ascended = True
        targets = self._perturber.targets
        found = gather_gradients(targets)
        if not found[0] and not any(target.parameter.requires_grad for target in targets):
            refuse_absence(targets)
        return self._perturber.agreed(found, averaged=True)

    def _move(self, direction: Direction) -> None:
        targets, values = direction
        overflow = self._perturber.move(
            (targets, self._scaling.unscaled(values)),
            self._radii,
            self._stats,
            norm=self.norm,
            relative=self.relative,
            eta=self.eta,
        )
        if overflow is not None:
            self._scaling.record(overflow)
        if self._random is not None:
            self._random.restore()

    def _parameters(self) -> list[nn.Parameter]:
        """Every parameter that a backward pass may leave a gradient in: the model's and the base optimizer's."""
        found = {id(p): p for p in self.model.parameters()}
        found.update({id(p): p for group in self.param_groups for p in group["params"]})
        return list(found.values())

    def _require_between_passes(self, what: str) -> None:
        if self._ascending is not None:
            raise RuntimeError(f"cannot {what} inside an ascent: leave its `with opt.ascent():` first")
        if self.is_perturbed:
            raise RuntimeError(
                f"cannot {what} while the weights are perturbed: "
                "leave `with opt.perturbed():` or call opt.restore() first"
            )

    def _creates_state(self) -> bool:
        """Whether a step is no update but torch.distributed.checkpoint's, which makes the base create its state."""
        if self._ascended or self.base.state or not self._rates_are_zero():
            return False
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(gradients) and not any(
            bool((g.to_local() if isinstance(g, DTensor) else g).any()) for g in gradients
        )

    def _rates_are_zero(self) -> bool:
        return all(float(group["lr"]) == 0 for group in self.param_groups if "lr" in group)

    def _require_ascent(self) -> None:
        if not self.due or (self._ascended and self._direction is None) or self._rates_are_zero():
            return
        if self._direction is not None:
            raise RuntimeError(
                "this update had an ascent and no descent after it: take the gradients inside `with opt.perturbed():`"
            )
        raise RuntimeError(
            "this update is due and had no ascent: use `with opt.ascent(): opt.ascend(loss)` and "
            "`with opt.perturbed(): …` before opt.step(), or pass a closure; "
            "in a transformers or trl trainer, use shapo.integrations.ShaPOTrainerMixin"
        )


def _complain_of(amiss: str | None) -> None:
    if amiss is not None:
        raise RuntimeError(amiss)
