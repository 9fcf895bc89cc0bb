"""ShaPOOptimizer: any torch optimizer, its loss minimised at weights moved along the gradient inside a subspace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .interop.deepspeed import EngineStep, is_engine, why_not
from .ops.subspace_update import NORMS
from .stochastic_rounding import StochasticRounding
from .subspace import Subspace
from .update.bound_subspace import Perturber
from .update.loss_scaling import LossScaling
from .update.radius import Radii, Rho, checked_rho
from .update.stats import UpdateStats
from .update.two_pass import TwoPassUpdate

_STATE_VERSION = 1


class ShaPOOptimizer(TwoPassUpdate):
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
        base_optimizer: an *instance* of a torch optimizer; its param groups and state stay its own. Around a DeepSpeed
            engine, the optimizer that ``deepspeed.initialize`` returned with it.
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
        seed: of the draws from a ``rho`` range, and of stochastic rounding.
        replay_rng: let pass 2 draw the random numbers that pass 1 drew, so that dropout's masks agree.
        stochastic_rounding: round bfloat16 and float16 weights stochastically where they are perturbed in place: right
            on average, where rounding to nearest loses small perturbations. Only with ``perturbation="in_place"``.

    Raises:
        TypeError: something that is not a torch optimizer instance, or one that cannot be wrapped.
        ValueError: an option out of range. SubspaceError: a subspace that does not fit the model.
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
    ) -> None:
        engine_step = EngineStep(model, base_optimizer) if is_engine(model) and why_not(model) is None else None
        super().__init__(engine_step or base_optimizer)
        for name, given, expected in (("model", model, nn.Module), ("subspace", subspace, Subspace)):
            if not isinstance(given, expected):
                raise TypeError(
                    f"{name} is {type(given).__name__}: expected {expected.__name__}, in the order "
                    "ShaPOOptimizer(base_optimizer, model, subspace, rho=...)"
                )
        _check_choice("ascent", ascent, ("selective", "grad"))
        _check_choice("perturbation", perturbation, ("auto", "in_place", "delta"))
        _check_choice("norm", norm, NORMS)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval is {interval!r}: expected a whole number of updates, 1 or more")
        if relative and norm == "none":
            raise ValueError("relative=True needs a norm: use norm='global' or norm='layer'")
        if not (isinstance(eta, float) and 0 <= eta < math.inf):
            raise ValueError(f"eta is {eta!r}: expected a number, 0 or more")
        if stochastic_rounding and perturbation != "in_place":
            raise ValueError(
                f"stochastic_rounding=True with perturbation={perturbation!r}: only 'in_place' rounds weights"
            )
        self.model = model
        self.subspace = subspace
        self.relative, self.interval, self.norm, self.sync, self.eta = relative, interval, norm, sync, eta
        self._radii = Radii(self.base, rho, norm, seed)
        self.replay_rng = replay_rng
        self._ascent_kind, self._perturbation_kind = ascent, perturbation
        self._rounding = StochasticRounding(seed) if stochastic_rounding else None
        self._updates = 0
        self._ascended = False
        self._stats = UpdateStats()
        self._scaling = LossScaling()
        self._bind()
        if engine_step is not None:
            engine_step.attach(self)

    def _bind(self) -> None:
        self._perturber = Perturber(
            self.model,
            self.subspace,
            ascent=self._ascent_kind,
            perturbation=self._perturbation_kind,
            relative=self.relative,
            sync=self.sync,
            rounding=self._rounding,
        )
        self._ascending = self._direction = self._random = None
        self._handed_over = self._detached = False

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
    def stats(self) -> dict[str, float]:
        """The last perturbation in numbers; reading it waits for the device.

        ``grad_norm`` ||g_S||, ``epsilon_norm`` ||eps||, ``weight_norm`` ||W_S||, ``relative_radius`` ||eps|| / ||W_S||,
        ``realised_norm`` and ``realised_cosine`` of what reaches the forward pass in the dtype it computes in (NaN
        where eps is zero), ``skipped`` perturbations since the start because the norm was not finite.
        """
        return self._stats.read()

    # -- life cycle

    def detach(self) -> None:
        """Leave the model as it was found: restored, without hooks. The wrapper is of no further use; the base is."""
        self._perturber.detach()
        if isinstance(self.base, EngineStep):
            self.base.detach()
        self._detached = True

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
            "roundings": self._rounding.draws if self._rounding is not None else 0,
            **self._stats.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up where :meth:`state_dict` was taken, to the bit, in the middle of an interval too.

        A base optimizer's own state dict is taken as well; the update counter then stays as it is.

        Raises:
            RuntimeError: while perturbed or inside an ascent. ValueError: of another version, or as the base raises.
        """
        self._require_between_passes("load a state")
        own = state_dict.get("shapo")
        if own is not None:
            self._check_loadable(own)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "shapo"})
        if own is not None:
            self.load_shapo_state_dict(own)

    def load_shapo_state_dict(self, own: Mapping[str, Any]) -> None:
        """Take what :meth:`shapo_state_dict` gave; the base's state stays as it is.

        Raises:
            RuntimeError: while perturbed or inside an ascent. ValueError: of another version.
        """
        self._require_between_passes("load a state")
        self._check_loadable(own)
        self.relative, self.interval = own["relative"], own["interval"]
        self.norm = self._radii.norm = own["norm"]
        self.rho = own["rho"]
        self._updates = own["updates"]
        self._radii.load_draws(own["draws"])
        if self._rounding is not None:
            self._rounding.draws = own.get("roundings", 0)
        self._stats.load(dict(own))
        self._direction, self._ascended = None, False

    def _check_loadable(self, own: Mapping[str, Any]) -> None:
        if own.get("version") != _STATE_VERSION:
            raise ValueError(f"the state is of version {own.get('version')!r}: expected {_STATE_VERSION}")
        if missing := {"updates", "rho", "relative", "interval", "norm", "draws", "skipped"} - set(own):
            raise ValueError(f"the state has no {sorted(missing)[0]!r}: it is damaged")
        _check_choice("the state's norm", own["norm"], NORMS)
        checked_rho(own["rho"], own["norm"])
        if own["relative"] and any(target.quantised for target in self._perturber.targets):
            raise ValueError("the state has relative=True, and a selected weight is quantised: its norm is unknown")

    def __getstate__(self) -> dict[str, Any]:
        self._require_between_passes("copy or pickle the optimizer")
        # `step` is on the instance where an LR scheduler has counted it; hooks and directions are made anew.
        transient = ("step", "_perturber", "_ascending", "_direction", "_random", "_scaling")
        kept = {key: value for key, value in self.__dict__.items() if key not in transient}
        return {**kept, "_ascended": False}  # an update goes on where its gradients are, which no copy has

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._scaling = LossScaling()
        self._bind()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
