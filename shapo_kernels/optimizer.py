"""ShaPOOptimizer: any torch optimizer, its loss minimised at weights moved along the gradient inside a subspace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .ascent import Ascent, GradAscent, clear_gradients
from .distributed import without_reduction
from .ops.subspace_update import NORMS
from .perturber import Direction, Perturber
from .radius import Radii, Rho, checked_rho
from .stats import UpdateStats
from .subspace import Subspace
from .wrapper import OptimizerWrapper

_STATE_VERSION = 1


class ShaPOOptimizer(OptimizerWrapper):
    r"""Sharpness-aware preference optimisation inside a subspace, around a base optimizer.

    .. math:: \min_\theta L(\theta + \epsilon), \qquad
              \epsilon = \rho \, \frac{g_S}{\|g_S\|_2 + \eta}, \qquad g_S = \nabla_\theta L(\theta) \text{ on } S

    (ShaPO, arXiv:2602.07340; with every parameter selected it is SAM, arXiv:2010.01412.) An update takes two passes
    over the batch: the *ascent* finds eps, the *descent* takes the gradient at theta + eps, with which the base
    optimizer then updates theta::

        opt = ShaPOOptimizer(torch.optim.AdamW(model.parameters()), model, subspace, rho=0.05)
        for batch in batches:
            if opt.due:
                with opt.ascent():
                    opt.ascend(loss(batch))        # any number of micro-batches; .grad stays as it is
            with opt.perturbed():
                loss(batch).backward()             # at theta + eps; theta again on leaving, by an exception too
            opt.step()
            opt.zero_grad()

    ``opt.step(closure)`` runs the whole update by itself; ``perturb``/``restore`` (or ``first_step``/``second_step``)
    drive it by hand from ``.grad``, as SAM implementations do.

    Args:
        base_optimizer: an *instance* of a torch optimizer; its param groups and state stay its own.
        model: the model whose weights the subspace names, wrapped or not.
        subspace: the selected neurons; names are the unwrapped model's.
        rho: radius of the perturbation (2-norm, >= 0; 0 makes every update a plain one). A param group may carry its
            own ``"rho"`` (``"shapo_rho"`` around Adadelta, which has a ``"rho"`` of another meaning). With
            ``norm="none"`` it is the factor on the raw gradient, or a ``(low, high)`` range to draw that from at every
            ShaPO update. ``opt.rho`` may be set at any time: a schedule, a plain warm start.
        relative: the radius is ``rho * ||W_S||``, taken on the device.
        interval: every ``interval``-th update is a ShaPO update, the others are plain ones.
        ascent: "selective" differentiates the selected neurons only; "grad" takes an ordinary backward pass.
        perturbation: "in_place" writes the selected neurons and restores their bits; "delta" adds eps in the forward
            pass and writes nothing (the one that survives low precision); "auto" is in_place where weights and
            computation are float32 or float64, else delta where every selected weight is a linear layer's.
        norm: "global" normalises by the norm over all selected neurons, "layer" by each weight's own, "none" not.
        sync: average the direction over data-parallel ranks; otherwise each rank perturbs along its own.
        eta: added to the norm.
        seed: of the draws from a ``rho`` range.

    Raises:
        TypeError: something that is not a torch optimizer instance, or one that cannot be wrapped.
        ValueError: an option out of range. SubspaceError: a subspace that does not fit the model.
    """

    # A GradScaler must unscale and check by itself: a fused base would look for its factors on the wrong object.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        base_optimizer: Optimizer,
        model: nn.Module,
        subspace: Subspace,
        *,
        rho: Rho,
        relative: bool = False,
        interval: int = 1,
        ascent: str = "selective",
        perturbation: str = "auto",
        norm: str = "global",
        sync: bool = True,
        eta: float = 1e-12,
        seed: int = 0,
    ) -> None:
        super().__init__(base_optimizer)
        _check_choice("ascent", ascent, ("selective", "grad"))
        _check_choice("perturbation", perturbation, ("auto", "in_place", "delta"))
        _check_choice("norm", norm, NORMS)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval is {interval!r}: expected a whole number of updates, 1 or more")
        if relative and norm == "none":
            raise ValueError("relative=True needs a norm: use norm='global' or norm='layer'")
        if not (isinstance(eta, float) and 0 <= eta < math.inf):
            raise ValueError(f"eta is {eta!r}: expected a number, 0 or more")
        self.model = model
        self.subspace = subspace
        self.relative, self.interval, self.norm, self.sync, self.eta = relative, interval, norm, sync, eta
        self._radii = Radii(base_optimizer, rho, norm, seed)
        self._ascent_kind, self._perturbation_kind = ascent, perturbation
        self._updates = 0
        self._ascended = False
        self._stats = UpdateStats()
        self._bind()

    def _bind(self) -> None:
        self._perturber = Perturber(
            self.model,
            self.subspace,
            ascent=self._ascent_kind,
            perturbation=self._perturbation_kind,
            sync=self.sync,
        )
        self._ascending: Ascent | None = None
        self._direction: Direction | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; it may carry its own ``"rho"``."""
        self._radii.check(param_group)
        super().add_param_group(param_group)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(rho={self.rho}, interval={self.interval}, ascent={self._ascent_kind!r}, "
            f"perturbation={self._perturbation_kind!r}, norm={self.norm!r}, {self.subspace!r}, base={self.base!r})"
        )

    # -- what this update is

    @property
    def rho(self) -> Rho:
        """The radius of groups that carry none of their own."""
        return self._radii.default

    @rho.setter
    def rho(self, value: Rho) -> None:
        self._radii.default = checked_rho(value, self.norm)

    @property
    def due(self) -> bool:
        """Whether the coming update is a ShaPO update: every ``interval``-th one, while any radius is above 0."""
        return (self._updates + 1) % self.interval == 0 and self._radii.any_positive()

    @property
    def updates(self) -> int:
        """How many updates have been taken."""
        return self._updates

    @property
    def stats(self) -> dict[str, float]:
        """The last perturbation in numbers; reading it waits for the device.

        ``grad_norm`` ||g_S||, ``epsilon_norm`` ||eps||, ``weight_norm`` ||W_S||, ``relative_radius`` ||eps|| / ||W_S||,
        ``realised_norm`` and ``realised_cosine`` of what reaches the forward pass in the dtype it computes in (NaN
        where eps is zero), ``skipped`` perturbations since the start because the norm was not finite.
        """
        return self._stats.read()

    # -- the update, pass by pass

    @contextlib.contextmanager
    def ascent(self) -> Iterator[None]:
        """Pass 1: forward passes inside belong to the ascent; hand their losses to :meth:`ascend`.

        In an update that is not due everything inside is ordinary and ``ascend`` does nothing: ask ``due`` first to
        save the forward pass.

        Raises:
            RuntimeError: inside another ascent, or while perturbed.
        """
        self._require_unperturbed("start an ascent")
        if self._ascending is not None:
            raise RuntimeError("an ascent is under way already: leave its `with opt.ascent():` first")
        if not self.due:
            yield
            return
        ascent = self._perturber.new_ascent(self._parameters())
        ascent.begin()
        self._ascending = ascent
        try:
            with without_reduction(self.model):
                yield
            self._direction = self._perturber.agreed(ascent.finish())
            self._ascended = True
        finally:
            ascent.abort()
            self._ascending = None

    def ascend(self, loss: Tensor) -> None:
        """Add one (micro-)batch's loss to the ascent; the sum over all calls is what the direction is the gradient of.

        Divide each loss by the number of micro-batches where the losses are means.

        Raises:
            RuntimeError: outside :meth:`ascent`; a loss without a graph, or one that no selected neuron took part in.
        """
        if self._ascending is None:
            if not self.due:
                return
            raise RuntimeError("ascend() is part of an ascent: call it inside `with opt.ascent():`")
        self._ascending.ascend(loss)

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Pass 2: inside, the model is at theta + eps; on leaving, by an exception too, at theta bit for bit.

        In a plain update it does nothing.

        Raises:
            RuntimeError: the update is due and there was no ascent; already perturbed.
        """
        self._require_unperturbed("perturb again")
        if self._direction is None:
            if self.due:
                raise RuntimeError(
                    "this update is due and has no direction: run `with opt.ascent(): opt.ascend(loss)` first"
                )
            yield
            return
        try:
            self._move(self._direction)
            yield
        finally:
            self._direction = None
            self.restore()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base optimizer's step, which ends the update.

        With a closure (it clears gradients, computes the loss, calls ``backward`` and returns the loss) the whole
        update is run: the closure twice where the update is due, once otherwise. Returns the first pass's loss.

        Raises:
            RuntimeError: while perturbed; or the update is due, has a learning rate above 0 and there was no ascent.
        """
        self._require_unperturbed("step")
        if closure is not None and self.due:
            loss: Any = self.base.step(lambda: self._two_passes(closure))
        elif closure is not None:
            loss = self.base.step(closure)
        elif self._creates_state():
            return self.base.step()
        else:
            self._require_ascent()
            loss = self.base.step()
        self._updates += 1
        self._ascended = False
        self._direction = None
        return loss

    # -- by hand

    @torch.no_grad()
    def perturb(self) -> None:
        """Move to theta + eps along an ascent's direction, else along ``.grad``, which is cleared for pass 2.

        In an update that is not due only ``.grad`` is cleared.

        Raises:
            RuntimeError: already perturbed.
        """
        self._require_unperturbed("perturb again")
        direction = self._direction
        if direction is None:
            if self.due:
                if self._perturber.gathered:
                    raise RuntimeError(
                        "the selected weights are sharded: use `with opt.ascent():` or a closure instead"
                    )
                direction = self._perturber.agreed(GradAscent(self._perturber.targets, []).finish(), averaged=True)
                self._ascended = True
            clear_gradients(self._parameters())
        self._direction = None
        if direction is not None:
            self._move(direction)

    def restore(self) -> None:
        """Back to theta, bit for bit; does nothing where nothing is perturbed."""
        self._perturber.restore()

    def first_step(self, zero_grad: bool = True) -> None:
        """:meth:`perturb` under the name that SAM implementations use; ``.grad`` is cleared in any case."""
        self.perturb()

    def second_step(self, zero_grad: bool = False) -> None:
        """:meth:`restore` and :meth:`step` under the name that SAM implementations use."""
        self.restore()
        self.step()
        if zero_grad:
            self.zero_grad()

    # -- life cycle

    def detach(self) -> None:
        """Leave the model as it was found: restored, without hooks. The wrapper is of no further use; the base is."""
        self._perturber.detach()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict and, under ``"shapo"``, what else resuming needs; clean while perturbed."""
        return {**self.base.state_dict(), "shapo": self.shapo_state_dict()}

    def shapo_state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the base's state: update counter, radius, draws; the same on every rank.

        ``torch.distributed.checkpoint``'s ``get_state_dict`` keeps the base's part of :meth:`state_dict` only: save
        this beside it.
        """
        return {
            "version": _STATE_VERSION,
            "updates": self._updates,
            "rho": self.rho,
            "relative": self.relative,
            "interval": self.interval,
            "norm": self.norm,
            "draws": self._radii.draws_state(),
            **self._stats.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up where :meth:`state_dict` was taken, to the bit, in the middle of an interval too.

        A base optimizer's own state dict is taken as well; the update counter then stays as it is.

        Raises:
            RuntimeError: while perturbed. ValueError: of another version, or as the base raises.
        """
        self._require_unperturbed("load a state")
        own = state_dict.get("shapo")
        if own is not None:
            _check_version(own)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "shapo"})
        if own is not None:
            self.load_shapo_state_dict(own)

    def load_shapo_state_dict(self, own: Mapping[str, Any]) -> None:
        """Take what :meth:`shapo_state_dict` gave; the base's state stays as it is.

        Raises:
            RuntimeError: while perturbed. ValueError: of another version.
        """
        self._require_unperturbed("load a state")
        _check_version(own)
        self.relative, self.interval = own["relative"], own["interval"]
        self.norm = self._radii.norm = own["norm"]
        self.rho = own["rho"]
        self._updates = own["updates"]
        self._radii.load_draws(own["draws"])
        self._stats.load(dict(own))
        self._direction, self._ascended = None, False

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("copy or pickle the optimizer")
        # `step` is on the instance where an LR scheduler has counted it; hooks and directions are made anew.
        transient = ("step", "_perturber", "_ascending", "_direction")
        return {key: value for key, value in self.__dict__.items() if key not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    # -- inside

    def _two_passes(self, closure: Callable[[], Any]) -> Any:
        ascent = self._perturber.new_ascent(self._parameters())
        with torch.enable_grad():
            ascent.begin()
            try:
                with without_reduction(self.model):
                    loss = closure()
                ascent.collect()
                direction = self._perturber.agreed(ascent.finish())
            finally:
                ascent.abort()
            clear_gradients(self._parameters())
            try:
                self._move(direction)
                closure()
            finally:
                self.restore()
        return loss

    def _move(self, direction: Direction) -> None:
        self._perturber.move(direction, self._radii, self._stats, norm=self.norm, relative=self.relative, eta=self.eta)

    def _parameters(self) -> list[nn.Parameter]:
        """Every parameter that a backward pass may leave a gradient in: the model's and the base optimizer's."""
        found = {id(p): p for p in self.model.parameters()}
        found.update({id(p): p for group in self.param_groups for p in group["params"]})
        return list(found.values())

    def _require_unperturbed(self, what: str) -> None:
        if self._perturber.active is not None:
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
        if not self.due or self._ascended or self._rates_are_zero():
            return
        raise RuntimeError(
            "this update is due and had no ascent: use `with opt.ascent(): opt.ascend(loss)` and "
            "`with opt.perturbed(): …` before opt.step(), or pass a closure; "
            "in a transformers or trl trainer, use shapo.integrations.ShaPOTrainerMixin"
        )


def _check_version(own: Mapping[str, Any]) -> None:
    if own.get("version") != _STATE_VERSION:
        raise ValueError(f"the state is of version {own.get('version')!r}: expected {_STATE_VERSION}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
