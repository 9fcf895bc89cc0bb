"""What a run is told: the loss, the perturbation and the loop, each a frozen dataclass that refuses impossible values.

Nothing here imports torch, so that the command line can read the defaults from here.  Every field that changes the
weights a run ends with is part of its fingerprint (see `shapo.training.checkpoint`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from shapo.ascents import AscentPart, RhoSchedule
from shapo.errors import UserError

LOSSES = ("dpo", "cdpo", "rdpo", "ipo", "ipo_mean", "simpo", "hinge", "reward_level")
AGGREGATIONS = ("mean", "drdpo")
OPTIMIZERS = ("adamw", "rmsprop", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
ASCENTS = ("selective", "grad")
PERTURBATIONS = ("auto", "in_place", "delta")
FUSED_HEADS = ("auto", "on", "off")
NORMS = ("global", "layer", "none")


@dataclass(frozen=True)
class LossConfig:
    """A preference loss and how the pairs of a batch are brought together.

    Attributes:
        name: One of `LOSSES`.  "reward_level" takes a reward model's soft labels in the place of the data's.
        beta: Inverse temperature of the implicit reward (for SimPO: the scale of the mean log-probabilities).
        epsilon: Assumed share of flipped labels, for "cdpo" and "rdpo" alone; 0 <= epsilon < 0.5.
        gamma: Target margin, for "simpo" alone.
        beta_reward: Scale of the reward difference, for "reward_level" alone.
        aggregation: "mean", or "drdpo" (Dr.DPO, arXiv:2407.07880) with its `beta_prime`.
    """

    name: str = "dpo"
    beta: float = 0.1
    epsilon: float | None = None
    gamma: float | None = None
    beta_reward: float | None = None
    aggregation: str = "mean"
    beta_prime: float | None = None

    def __post_init__(self) -> None:
        _choice("loss", self.name, LOSSES)
        _choice("aggregation", self.aggregation, AGGREGATIONS)
        _positive("beta", self.beta)
        self._settle("epsilon", 0.1, ("cdpo", "rdpo"))
        self._settle("gamma", 0.5, ("simpo",))
        self._settle("beta_reward", 10.0, ("reward_level",))
        if self.aggregation == "drdpo":
            object.__setattr__(self, "beta_prime", 1.0 if self.beta_prime is None else self.beta_prime)
            _positive("beta_prime", self.beta_prime)
        elif self.beta_prime is not None:
            raise UserError("beta_prime is an option of the aggregation drdpo, not of mean")
        if self.epsilon is not None and not 0 <= self.epsilon < 0.5:
            raise UserError(f"epsilon is {self.epsilon}, but a share of flipped labels in [0, 0.5) is expected")
        if self.beta_reward is not None:
            _positive("beta_reward", self.beta_reward)
        if self.gamma is not None and not math.isfinite(self.gamma):
            raise UserError(f"gamma is {self.gamma}, but a finite margin is expected")

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with the reference model (SimPO does not)."""
        return self.name != "simpo"

    @property
    def uses_rewards(self) -> bool:
        """Whether the loss takes its labels from a reward model."""
        return self.name == "reward_level"

    def _settle(self, option: str, default: float, losses: tuple[str, ...]) -> None:
        value = getattr(self, option)
        if self.name in losses:
            object.__setattr__(self, option, default if value is None else value)
        elif value is not None:
            raise UserError(f"{option} is an option of {' and '.join(losses)}, not of the loss {self.name}")


@dataclass(frozen=True)
class ShaPOConfig:
    """How weights are perturbed for the second pass; see `shapo_kernels.ShaPOOptimizer`.

    Attributes:
        rho: Radius of the perturbation in weight units, or with `relative` as a multiple of the norm of the subspace's
            weights. With the norm "none" the factor on the raw gradient, or a range (low, high) that each ShaPO update
            draws it from.
        interval: A ShaPO update every `interval`-th update, plain updates between.
        plain_updates: Plain updates before the first ShaPO update.
        rho_warmup: Updates after those over which rho rises linearly from rho / rho_warmup to rho.
        ascent_fraction, ascent_pairs: The share, or the number, of the pairs that an ascent looks at; drawn with the
            loop's seed. See `shapo.ascents.AscentPart`.
        per_micro_batch: Each micro-batch has an ascent and a perturbation of its own (m-sharpness), in the place of
            one of the whole batch.
    """

    rho: float | tuple[float, float]
    relative: bool = False
    interval: int = 1
    ascent: str = "selective"
    perturbation: str = "auto"
    norm: str = "global"
    plain_updates: int = 0
    rho_warmup: int = 0
    ascent_fraction: float = 1.0
    ascent_pairs: int | None = None
    per_micro_batch: bool = False

    def __post_init__(self) -> None:
        for bound in self.rho if isinstance(self.rho, tuple) else (self.rho,):
            _positive("rho", bound)
        _at_least("interval", self.interval, 1)
        _choice("ascent", self.ascent, ASCENTS)
        _choice("perturbation", self.perturbation, PERTURBATIONS)
        _choice("norm", self.norm, NORMS)
        try:
            self.schedule()
            self.part(0)
        except ValueError as error:
            raise UserError(error) from error
        if isinstance(self.rho, tuple) and (self.norm != "none" or self.rho[0] > self.rho[1]):
            raise UserError(f"rho is the range {self.rho}; a range low,high needs the norm none and low <= high")
        if self.relative and self.norm == "none":
            raise UserError("a relative rho needs a normalised perturbation: choose the norm global or layer")

    def schedule(self) -> RhoSchedule:
        """The radius of every update."""
        return RhoSchedule(self.rho, self.plain_updates, self.rho_warmup)

    def part(self, seed: int) -> AscentPart:
        """What ascents look at."""
        return AscentPart(self.ascent_fraction, self.ascent_pairs, seed)


@dataclass(frozen=True)
class LoopConfig:
    """The loop around the loss: how long, how large, how fast, and what is written when.

    Attributes:
        updates: Number of updates, or None for `epochs` passes over the data.
        batch_size: Pairs (preference) or examples (SFT) an update.
        micro_batch_size: What goes through the model at once; None for the whole batch.
        warmup: Updates over which the learning rate rises linearly from lr / warmup to lr.
        clip: Largest norm of the gradient, clipped once, in pass 2; 0 for none.
        fused_head: "auto" never makes the logits of a model whose head is a plain linear layer, "on" refuses another.
        eval_every, save_every: In updates; 0 for the end only.
    """

    updates: int | None = None
    epochs: int = 1
    batch_size: int = 16
    micro_batch_size: int | None = None
    lr: float = 5e-7
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: int = 10
    schedule: str = "constant"
    clip: float = 1.0
    bf16: bool = False
    fused_head: str = "auto"
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        if self.updates is not None:
            _at_least("the number of updates", self.updates, 1)
        _at_least("the number of epochs", self.epochs, 1)
        _at_least("the batch size", self.batch_size, 1)
        if self.micro_batch_size is not None:
            _at_least("the micro-batch size", self.micro_batch_size, 1)
        _positive("the learning rate", self.lr)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("fused head", self.fused_head, FUSED_HEADS)
        for name in ("warmup", "eval_every", "save_every", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}, but torch takes numbers below 2 ** 63")
        for name in ("clip", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}, but a finite value of at least 0 is expected")

    def total_updates(self, examples: int) -> int:
        """Updates of the whole run over `examples` examples; the last batch of an epoch may be a partial one."""
        return self.updates if self.updates is not None else self.epochs * math.ceil(examples / self.batch_size)


# Fields that say when something is written, not what is learned.
_UNRELATED_TO_WEIGHTS = ("eval_every", "save_every")


def identity(config: LossConfig | ShaPOConfig | LoopConfig) -> dict[str, Any]:
    """The fields of `config` that decide which weights a run ends with, by name."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _UNRELATED_TO_WEIGHTS}


def _choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")


def _positive(what: str, value: float | None) -> None:
    if value is None or not (math.isfinite(value) and value > 0):
        raise UserError(f"{what} is {value}, but a finite value above 0 is expected")


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{what} is {value}, but a whole number of at least {least} is expected")
