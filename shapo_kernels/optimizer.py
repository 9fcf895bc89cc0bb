"""ShaPOOptimizer: any torch optimizer, its loss minimised at weights moved along the gradient inside a subspace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .interop.sharding import local_part
from .ops._checks import check_choice, check_switches, check_whole
from .perturbation import StochasticRounding
from .subspace import Subspace
from .update.base import BaseFacade, base_for
from .update.bound_subspace import BoundSubspace
from .update.loss_scaling import CLOSURE
from .update.phase import Phase
from .update.prefix import Prefix
from .update.radius import Radius, Rho
from .update.saved_state import check_state, load_state, make_state
from .update.stats import UpdateStats
from .update.training import check_trains
from .update.two_pass import TwoPassUpdate


class ShaPOOptimizer(BaseFacade):
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

    `opt.step(closure)` runs the whole update by itself; `perturb`/`restore` (or `first_step`/`second_step`)
    drive it by hand from `.grad`, as SAM implementations do.

    Args:
        base_optimizer: an *instance* of a torch optimizer; its param groups and state stay its own. Around a DeepSpeed
            engine, the optimizer that `deepspeed.initialize` returned with it.
        model: the model whose weights the subspace names, wrapped or not.
        subspace: the selected neurons; names are the unwrapped model's.
        rho: radius of the perturbation (2-norm, >= 0; 0 makes every update a plain one). A param group may carry its
            own `"rho"` (`"shapo_rho"` around Adadelta, which has a `"rho"` of another meaning). With
            `norm="none"` it is the factor on the raw gradient, or a `(low, high)` range to draw that from at every
            ShaPO update. `opt.rho` may be set at any time: a schedule, a plain warm start.
        relative: the radius is `rho * ||W_S||`, taken on the device.
        interval: every `interval`-th update is a ShaPO update, the others are plain ones.
        ascent: "selective" differentiates the selected neurons only; "grad" takes an ordinary backward pass.
        perturbation: "in_place" writes the selected neurons and restores their bits; "delta" adds eps in the forward
            pass and writes nothing (the one that survives low precision); "auto" is in_place where weights and
            computation are float32 or float64, else delta where every selected weight is a linear layer's.
        norm: "global" normalises by the norm over all selected neurons, "layer" by each weight's own, "none" not.
        sync: average the direction over data-parallel ranks; otherwise each rank perturbs along its own.
        eta: added to the norm.
        seed: of the draws from a `rho` range, and of stochastic rounding.
        replay_rng: let pass 2 draw the random numbers that pass 1 drew, so that dropout's masks agree.
        stochastic_rounding: round bfloat16 and float16 weights stochastically where they are perturbed in place: right
            on average, where rounding to nearest loses small perturbations. Only with `perturbation="in_place"`.
        reuse_prefix: the descent takes the blocks below the lowest selected layer from the ascent's forward pass, graph
            and all. Exact; with f the share of the depth above it costs 3 + 2 f units instead of 5. Both passes must
            take the same rows in the same order, anything else raises. `True` finds the stack of blocks, a string
            names it (`"model.layers"`). One graph for each micro-batch is kept until its descent.

    Raises:
        TypeError: something that is not a torch optimizer instance, or one that cannot be wrapped; a switch that is
            not True or False.
        ValueError: an option out of range, a base over the parameters of another model (a copy, say), or no stack of
            blocks to reuse. SubspaceError: a subspace that does not fit the model.
    """

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
        replay_rng: bool = False,
        stochastic_rounding: bool = False,
        reuse_prefix: bool | str = False,
    ) -> None:
        super().__init__(base_for(base_optimizer, model))
        for name, given, expected in (("model", model, nn.Module), ("subspace", subspace, Subspace)):
            if not isinstance(given, expected):
                raise TypeError(
                    f"{name} is {type(given).__name__}: expected {expected.__name__}, in the order "
                    "ShaPOOptimizer(base_optimizer, model, subspace, rho=...)"
                )
        check_choice("ascent", ascent, ("selective", "grad"))
        check_choice("perturbation", perturbation, ("auto", "in_place", "delta"))
        check_switches(sync=sync, stochastic_rounding=stochastic_rounding)
        if stochastic_rounding and perturbation != "in_place":
            raise ValueError(
                f"stochastic_rounding=True with perturbation={perturbation!r}: only 'in_place' rounds weights"
            )
        if not isinstance(reuse_prefix, (bool, str)):
            raise TypeError(f"reuse_prefix is {reuse_prefix!r}: expected True, False or the name of a stack of blocks")
        check_trains(self._base, model)
        self._model, self.subspace = model, subspace
        self.interval, self.replay_rng = interval, replay_rng
        self._sync, self._reuse_prefix = sync, reuse_prefix
        self._ascent_kind, self._perturbation_kind = ascent, perturbation
        self._radius = Radius(self._base, rho, relative=relative, norm=norm, eta=eta, seed=seed)
        self._rounding = StochasticRounding(seed) if stochastic_rounding else None
        self._updates = 0
        self._stats = UpdateStats()
        self._update = self._new_update()
        self._base.attach(self)

    def _new_update(self) -> TwoPassUpdate:
        bound = BoundSubspace(
            self._model,
            self.subspace,
            ascent=self._ascent_kind,
            perturbation=self._perturbation_kind,
            relative=self.relative,
            sync=self._sync,
            why_no_gradients=self._base.why_no_gradients,
            rounding=self._rounding,
        )
        prefix = Prefix(self._reuse_prefix)
        prefix.find(self._model, bound.layers)
        return TwoPassUpdate(self._model, bound, self._base, self._radius, self._stats, prefix, sync=self._sync)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(rho={self.rho}, interval={self.interval}, ascent={self._ascent_kind!r}, "
            f"perturbation={self._perturbation_kind!r}, norm={self.norm!r}, {self.subspace!r}, base={self.base!r})"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; it may carry its own `"rho"`."""
        self._radius.check_group(param_group)
        super().add_param_group(param_group)

    # -- what this update is

    @property
    def model(self) -> nn.Module:
        """The model; set it where it is wrapped after the optimizer was made."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = self._update.model = model

    @property
    def due(self) -> bool:
        """Whether the coming update is a ShaPO update: every `interval`-th one, while any radius is above 0."""
        return (self._updates + 1) % self.interval == 0 and self._radius.any_positive()

    @property
    def updates(self) -> int:
        """How many updates have been taken."""
        return self._updates

    @property
    def phase(self) -> Phase:
        """Where the update stands."""
        return self._update.phase

    @property
    def is_perturbed(self) -> bool:
        """Whether the model is at theta + eps: in pass 2, which a closure cannot tell by itself."""
        return self.phase is Phase.DESCENDING

    @property
    def rho(self) -> Rho:
        """The radius of groups that carry none of their own. May be set at any time."""
        return self._radius.rho

    @rho.setter
    def rho(self, value: Rho) -> None:
        self._radius.rho = value

    @property
    def interval(self) -> int:
        """Every how many updates one is a ShaPO update, 1 or more; may be set between updates."""
        return self._interval

    @interval.setter
    def interval(self, value: int) -> None:
        check_whole("interval", value, least=1)
        self._interval = value

    @property
    def replay_rng(self) -> bool:
        """Whether pass 2 draws the random numbers that pass 1 drew; may be set between updates."""
        return self._replay_rng

    @replay_rng.setter
    def replay_rng(self, value: bool) -> None:
        check_switches(replay_rng=value)
        self._replay_rng = value

    @property
    def sync(self) -> bool:
        """Whether the direction is averaged over data-parallel ranks."""
        return self._sync

    @property
    def reuse_prefix(self) -> bool | str:
        """Whether the descent reuses the blocks below, or the name of their stack."""
        return self._reuse_prefix

    @property
    def relative(self) -> bool:
        """Whether rho is a multiple of ||W_S||."""
        return self._radius.relative

    @property
    def norm(self) -> str:
        """What the gradient is divided by: "global", "layer" or "none"."""
        return self._radius.norm

    @property
    def eta(self) -> float:
        """Added to the norm."""
        return self._radius.eta

    @property
    def stats(self) -> dict[str, float]:
        """The last perturbation in numbers; reading it waits for the device.

        `grad_norm` ||g_S||, `epsilon_norm` ||eps||, `weight_norm` ||W_S||, `relative_radius` ||eps|| / ||W_S||,
        `realised_norm` and `realised_cosine` of what reaches the forward pass in the dtype it computes in (NaN
        where eps is zero), `skipped` perturbations since the start because the norm was not finite. With
        `reuse_prefix`: `prefix_blocks` that the descent reuses, and `prefix_bytes` of activations that the first
        ascent kept for it, over all micro-batches (NaN where blocks are compiled).
        """
        return {**self._stats.read(), **self._update.prefix.stats()}

    # -- an update by contexts

    @contextlib.contextmanager
    def ascent(self) -> Iterator[None]:
        """Pass 1: forward passes inside belong to the ascent; hand their losses to :meth:`ascend`.

        In an update that is not due everything inside is ordinary and `ascend` does nothing. Ask `due` first to
        save the forward pass. A second ascent before the descent replaces the first one's direction.

        Raises:
            RuntimeError: inside another ascent, or while perturbed; on leaving, where no loss was handed over.
        """
        self._update.check_between_passes("start an ascent")
        with self._update.ascent(replay_rng=self.replay_rng) if self.due else contextlib.nullcontext():
            yield

    def ascend(self, loss: Tensor, *, scaler: Any = None) -> None:
        """Adds one (micro-)batch's loss to the ascent; the direction is the gradient of the sum over all calls.

        Divide each loss by the number of micro-batches where the losses are means.

        Args:
            loss: a scalar.
            scaler: a `torch.amp.GradScaler` to scale it with, so that float16 gradients do not underflow; the
                direction is unscaled again. Where the direction is normalised, a loss that is scaled already will do.

        Raises:
            RuntimeError: outside :meth:`ascent`; a loss without a graph, or one that no selected neuron took part in.
        """
        if self.due or self.phase is Phase.ASCENDING:
            self._update.ascend(loss, scaler)

    @contextlib.contextmanager
    def ascent_part(self, run: Callable[[], Any], rows: Tensor) -> Iterator[None]:
        """For an ascent on some rows of a batch with `reuse_prefix`: the blocks below run for all of its rows. ::

            with opt.ascent():
                with opt.ascent_part(lambda: model(**batch), rows):
                    opt.ascend(loss(model, part_of(batch, rows)))
            with opt.perturbed():
                loss(model, batch).backward()

        Where nothing is reused it does nothing, and `run` is not called.

        Args:
            run: one forward pass over the whole batch. It is left where the blocks below end.
            rows: int64 `[n]`, the batch's rows that the model is given inside, padded as the batch is. The block may
                be empty: a micro-batch that the ascent does not look at.

        Raises:
            RuntimeError: the model is given other rows inside.
        """
        with self._update.prefix.part(run, rows):
            yield

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Pass 2: inside, the model is at theta + eps; on leaving, by an exception too, at theta bit for bit.

        Forward and backward passes both belong inside. In a plain update it does nothing.

        Raises:
            RuntimeError: the update is due and there was no ascent; already perturbed.
        """
        self._update.check_between_passes("perturb")
        plain = self._update.direction is None and not self.due
        with contextlib.nullcontext() if plain else self._update.descent():
            yield

    @contextlib.contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Inside a descent, theta again for a while, for passes without gradients: those of a reference model that
        shares the policy's weights, as an adapter's does. Elsewhere it only turns gradients off.
        """
        with self._update.unperturbed():
            yield

    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:
        """The base optimizer's step, which ends the update.

        Args:
            closure: clears gradients, computes the loss, calls `backward` and returns the loss. With it the whole
                update is run: the closure twice where the update is due, once otherwise.
            scaler: the `torch.amp.GradScaler` that the closure scales its loss with; it is asked to step.

        Returns:
            The first pass's loss, or what the base's step returns.

        Raises:
            RuntimeError: while perturbed or inside an ascent; the update is due, has a learning rate above 0 and there
                was no ascent, no descent after it, or a pass that left no gradient; a closure by way of `scaler.step`.
                TypeError: a scaler without a closure.
        """
        self._base.check_step(closure, scaler)
        if not self._base.ends_update():
            return None
        if self._base.steps_in_descent:
            self._update.restore()
        self._update.check_between_passes("step")
        if closure is not None:
            return self._step_with(closure, scaler)
        if self._creates_state():
            return self._base.take_step()[0]
        if self.due and not self._rates_are_zero():
            self._update.check_complete()
        self._update.prefix.check()
        if self._update.scaling.overflowed():
            self._update.finish()
            return None
        result, updated = self._base.take_step()
        self._updates += updated
        self._update.finish()
        return result

    def _step_with(self, closure: Callable[[], Any], scaler: Any) -> Any:
        def passes() -> Any:
            if self.due:
                return self._update.run(closure, scaler, replay_rng=self.replay_rng)
            return self._update.run_plain(closure)

        if scaler is not None:
            loss = passes()
            scaler.step(self)
            return loss
        if self._update.scaling.stepping:
            raise RuntimeError(CLOSURE)
        loss, updated = self._base.take_step(passes)
        self._updates += updated
        self._update.finish()
        return loss

    def _creates_state(self) -> bool:
        """Whether a step is no update but torch.distributed.checkpoint's, which makes the base create its state."""
        if self.phase is not Phase.IDLE or self.base.state or not self._rates_are_zero():
            return False
        gradients: list[Any] = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(gradients) and not any(bool(local_part(g).any()) for g in gradients)

    def _rates_are_zero(self) -> bool:
        return all(float(group["lr"]) == 0 for group in self.param_groups if "lr" in group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A GradScaler asks this before it unscales and steps. It must do both by itself: a fused base would look for
        # its factors on the wrong object.
        self._update.scaler_asks()
        return False

    # -- an update by hand

    def perturb(self) -> None:
        """Moves to theta + eps along an ascent's direction, else along `.grad`, which is cleared for pass 2.

        In an update that is not due only `.grad` is cleared.

        Raises:
            RuntimeError: already perturbed; without an ascent and with `replay_rng=True`, or sharded weights.
        """
        self._perturb(clear_gradients=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _perturb(self, *, clear_gradients: bool) -> None:
        self._update.perturb(due=self.due, replay_rng=self.replay_rng, clear=clear_gradients)

    def restore(self) -> None:
        """Back to theta, bit for bit; does nothing where nothing is perturbed.

        Raises:
            RuntimeError: somebody else wrote to the weights while they were perturbed in place; they are restored.
        """
        self._update.restore()

    def first_step(self, zero_grad: bool = True) -> None:
        """:meth:`perturb` under the name that SAM implementations use.

        Args:
            zero_grad: clear the gradients for pass 2. With False, clear them yourself before its backward pass.
        """
        check_switches(zero_grad=zero_grad)
        self._perturb(clear_gradients=zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """:meth:`restore` and :meth:`step` under the name that SAM implementations use.

        Args:
            zero_grad: clear gradients afterwards.
        """
        check_switches(zero_grad=zero_grad)
        self.restore()
        self.step()
        if zero_grad:
            self.zero_grad()

    # -- life cycle

    def detach(self) -> None:
        """Leaves the model as it was found: restored, without hooks. Go on with the base optimizer."""
        self._update.detach()
        self._base.detach()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict and, under `"shapo"`, what else resuming needs; clean while perturbed."""
        return {**self.base.state_dict(), "shapo": self.shapo_state_dict()}

    def shapo_state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the base's state; the same on every rank.

        The update counter, `interval`, `rho`, `relative`, `norm`, the state of the draws, and the counters of
        stochastic roundings and of skipped perturbations. `torch.distributed.checkpoint`'s `get_state_dict` keeps the
        base's part of :meth:`state_dict` only: save this beside it.
        """
        return make_state(self._updates, self.interval, self._radius, self._rounding, self._stats)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resumes where :meth:`state_dict` was taken, to the bit, in the middle of an interval too.

        It replaces the base's state and groups and all that :meth:`shapo_state_dict` lists: `rho`, `relative`, `norm`
        and `interval` are then the saved ones, not those given at construction. Set `opt.rho` and `opt.interval`
        afterwards to go on with others. `eta` and the other options stay. A base optimizer's own state dict is taken
        as well; only the base's part is then replaced.

        Raises:
            RuntimeError: while perturbed or inside an ascent. ValueError: damaged or of another version, found before
                anything is changed; or as the base raises.
        """
        self._update.check_between_passes("load a state")
        own = state_dict.get("shapo")
        if own is not None:
            self._check_state(own, state_dict.get("param_groups"))
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "shapo"})
        if own is not None:
            self.load_shapo_state_dict(own)

    def load_shapo_state_dict(self, own: Mapping[str, Any]) -> None:
        """Loads what :meth:`shapo_state_dict` gave, all that it lists; the base's state stays as it is.

        Raises:
            RuntimeError: while perturbed or inside an ascent. ValueError: damaged or of another version, found before
                anything is changed.
        """
        self._update.check_between_passes("load a state")
        self._check_state(own)
        load_state(own, self._radius, self._rounding, self._stats)
        self.interval, self._updates = own["interval"], own["updates"]
        self._update.forget()

    def _check_state(self, own: Any, groups: Any = None) -> None:
        check_state(own, self._radius, quantised=self._update.bound.quantised, groups=groups)

    def __getstate__(self) -> dict[str, Any]:
        self._update.check_between_passes("copy or pickle the optimizer")
        # `step` is on the instance where an LR scheduler has counted it. Hooks and directions are made anew: an update
        # goes on where its gradients are, which no copy has.
        return {key: value for key, value in self.__dict__.items() if key not in ("step", "_update")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._update = self._new_update()
