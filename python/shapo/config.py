"""What a run is told: the loss, the perturbation and the loop, each a table of options that refuses impossible values.

Nothing here imports torch, so that the command line can be made of it. Every field that changes the weights a run ends
with is part of its fingerprint (see `shapo.training.checkpoint`).
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from shapo.ascents import AscentPart, RhoSchedule
from shapo.checked import checked
from shapo.errors import UserError
from shapo.options import Option, declared, option, radius, seed_number, whole

if TYPE_CHECKING:
    from shapo_kernels.update.radius import Rho

LOSSES = ("dpo", "cdpo", "rdpo", "ipo", "ipo_mean", "simpo", "hinge", "reward_level")
AGGREGATIONS = ("mean", "drdpo")
OPTIMIZERS = (
    "adamw",
    "adam",
    "nadam",
    "radam",
    "rmsprop",
    "sgd",
    "adagrad",
    "adafactor",
    "torchao_adamw_8bit",
    "torchao_adamw_4bit",
    "torchao_adamw_fp8",
    "bnb_adamw_8bit",
    "bnb_paged_adamw_8bit",
    "bnb_lion_8bit",
)
SCHEDULES = ("constant", "linear", "cosine")
ASCENTS = ("selective", "grad")
PERTURBATIONS = ("auto", "in_place", "delta")
FUSED_HEADS = ("auto", "on", "off")
TRACKERS = ("tensorboard", "wandb", "trackio")
NORMS = ("global", "layer", "none")
_LARGEST = 1e38  # of what float32 holds


def _trackers(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


@checked
@dataclass(frozen=True)
class LossConfig:
    """A preference loss and how the pairs of a batch are brought together. Formulas: docs/losses.md.

    "reward_level" takes a reward model's soft labels instead of the data's; "drdpo" is Dr.DPO (arXiv:2407.07880). An
    option that the loss does not use stays None.

    Raises:
        UserError: A value out of range, or an option of another loss.
    """

    name: str = option("formulas: docs/losses.md", "dpo", flag="loss", choices=LOSSES)
    beta: float = option("inverse temperature of the implicit reward (simpo: scale of the mean log-probabilities)", 0.1)
    epsilon: float | None = option(
        "assumed share of flipped labels, in [0, 0.5)",
        None,
        of=("cdpo", "rdpo"),
        parse=float,
        absent="0.1",
        metavar="SHARE",
    )
    gamma: float | None = option("target margin", None, of=("simpo",), parse=float, absent="0.5")
    beta_reward: float | None = option(
        "scale of the reward difference", None, of=("reward_level",), parse=float, absent="10"
    )
    aggregation: str = option("how the losses of a batch's pairs are combined", "mean", choices=AGGREGATIONS)
    beta_prime: float | None = option("temperature, in nats", None, of=("drdpo",), parse=float, absent="1")
    nll: float = option(
        "weight of the chosen responses' negative log-likelihood per token, added to the loss", 0.0, metavar="WEIGHT"
    )

    def __post_init__(self) -> None:
        _choice("loss", self.name, LOSSES)
        _choice("aggregation", self.aggregation, AGGREGATIONS)
        _positive("beta", self.beta)
        if not 0 <= self.nll < math.inf:
            raise UserError(f"nll is {self.nll}, but a finite weight of at least 0 is expected")
        for name, (_, told) in declared(type(self)).items():
            if told.of:
                self._settle(name, told)
        if self.epsilon is not None and not 0 <= self.epsilon < 0.5:
            raise UserError(f"epsilon is {self.epsilon}, but a share of flipped labels in [0, 0.5) is expected")
        for name in ("beta_reward", "beta_prime"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
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

    def _settle(self, name: str, told: Option) -> None:
        """Fills in what the loss or the aggregation uses; refuses what it does not."""
        value = getattr(self, name)
        if {self.name, self.aggregation} & set(told.of):
            object.__setattr__(self, name, told.parse(str(told.absent)) if value is None else value)
        elif value is not None:
            whole = self.aggregation if set(told.of) <= set(AGGREGATIONS) else f"the loss {self.name}"
            raise UserError(f"{name} is an option of {' and '.join(told.of)}, not of {whole}")


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """The options of a ShaPO update, for every loop: the command's and the trainers'.

    Those of the optimizer are keyword arguments of `shapo_kernels.ShaPOOptimizer`, where they are explained.

    Raises:
        ValueError: `ascent_fraction`, `ascent_pairs`, `plain_updates` or `rho_warmup` out of range.
    """

    rho: Rho | None = option(
        "radius of the perturbation; makes the run a ShaPO run (low,high: with --norm none)",
        None,
        parse=radius,
        metavar="RHO",
        optimizers=True,
    )
    relative: bool = option(
        "--rho is a multiple of the norm of the selected weights",
        False,
        flag="relative_rho",
        optimizers=True,
    )
    interval: int = option("a ShaPO update every N updates, plain ones between", 1, metavar="N", optimizers=True)
    plain_updates: int = option("plain updates before the first ShaPO update", 0, metavar="N")
    rho_warmup: int = option("then a linear rise of rho over N updates", 0, metavar="N")
    ascent: str = option(
        "gradient of the selected neurons alone, or .grad", "selective", choices=ASCENTS, optimizers=True
    )
    ascent_fraction: float = option(
        "share of a batch's pairs for the ascent, in (0, 1], drawn anew for each update",
        1.0,
        alone="part",
    )
    ascent_pairs: int | None = option(
        "number of a batch's pairs for the ascent",
        None,
        parse=whole,
        metavar="N",
        absent="all",
        alone="part",
    )
    per_micro_batch: bool = option(
        "a perturbation for each micro-batch, from its own ascent (m-sharpness), not one for the batch",
        False,
    )
    perturbation: str = option(
        "write eps into the weights, or add it in the forward pass", "auto", choices=PERTURBATIONS, optimizers=True
    )
    norm: str = option(
        "norm of the gradient over all layers, of each layer, or none", "global", choices=NORMS, optimizers=True
    )
    reuse_prefix: bool | str = option(
        "compute the blocks below the lowest selected layer once an update; exact",
        False,
        parse=bool,
        optimizers=True,
    )

    def for_optimizer(self) -> dict[str, Any]:
        """The keyword arguments of a `ShaPOOptimizer` among these options."""
        return {
            field.name: getattr(self, field.name) for field, told in declared(type(self)).values() if told.optimizers
        }

    def part(self, seed: int) -> AscentPart:
        """What ascents look at."""
        return AscentPart(self.ascent_fraction, self.ascent_pairs, seed)

    def schedule(self, rho: Rho) -> RhoSchedule:
        """The radius of every update, `rho` in the end."""
        return RhoSchedule(rho, self.plain_updates, self.rho_warmup)


@checked
@dataclass(frozen=True)
class ShaPOConfig(UpdateOptions):
    """A ShaPO run of the command line.

    `rho` is in weight units, or with `relative` a multiple of the norm of the subspace's weights. With the norm "none"
    it is the factor on the raw gradient, or a range (low, high) that each ShaPO update draws it from.

    Raises:
        UserError: A value out of range, or two that cannot be meant together.
    """

    def __post_init__(self) -> None:
        for bound in self.rho if isinstance(self.rho, tuple) else (self.rho,):
            _positive("rho", bound)
        _at_least("interval", self.interval, 1)
        _choice("ascent", self.ascent, ASCENTS)
        _choice("perturbation", self.perturbation, PERTURBATIONS)
        _choice("norm", self.norm, NORMS)
        try:
            self.schedule(self.rho or 0.0)
            self.part(0)
        except ValueError as error:
            raise UserError(error) from error
        if isinstance(self.rho, tuple) and (self.norm != "none" or self.rho[0] > self.rho[1]):
            raise UserError(f"rho is the range {self.rho}; a range low,high needs the norm none and low <= high")
        if self.relative and self.norm == "none":
            raise UserError("a relative rho needs a normalised perturbation: choose the norm global or layer")


@checked
@dataclass(frozen=True)
class LoopConfig:
    """The loop around the loss: how long, how large, how fast, and what is written when.

    Raises:
        UserError: A value out of range.
    """

    epochs: int = option("passes over the data", 1, alone="length")
    updates: int | None = option("number of updates, instead of epochs", None, parse=whole, metavar="N", alone="length")
    batch_size: int = option("examples per update", 16, metavar="N")
    micro_batch_size: int | None = option(
        "examples through the model at once, on each rank",
        None,
        parse=whole,
        metavar="N",
        absent="the batch",
        alone="micro",
    )
    accumulate: int | None = option(
        "micro-batches per update, instead of their size", None, parse=whole, metavar="N", absent="1", alone="micro"
    )
    lr: float = option("learning rate after the warm-up", 5e-7)
    optimizer: str = option("base optimizer, of torch, torchao or bitsandbytes", "adamw", choices=OPTIMIZERS)
    weight_decay: float = option("of the base optimizer", 0.0)
    warmup: int = option("linear rise of the learning rate from lr / UPDATES", 10, metavar="UPDATES")
    schedule: str = option("learning rate after the warm-up", "constant", choices=SCHEDULES)
    clip: float = option("largest gradient norm (descent pass); 0 for none", 1.0)
    bf16: bool = option("compute in bfloat16 under autocast; the weights stay in --dtype", False)
    fused_head: str = option(
        "log-probabilities without the logits: where the model allows it, always (or an error), never",
        "auto",
        choices=FUSED_HEADS,
    )
    dropout: bool = option("keep the model's dropout, which is off otherwise", False)
    seed: int = option("of data order and dropout", 0, parse=seed_number)
    eval_every: int = option("updates between evaluations; 0: only before and after training", 0, metavar="UPDATES")
    save_every: int = option("updates between checkpoints; 0: only on Ctrl-C", 0, metavar="UPDATES")
    keep: int = option("checkpoints to keep: the last one and N - 1 before it, as checkpoint-UPDATE.pt", 1, metavar="N")
    report_to: tuple[str, ...] | None = option(
        "send metrics there too: tensorboard, wandb, trackio, separated by commas",
        None,
        parse=_trackers,
        metavar="NAMES",
        absent="only metrics.jsonl",
    )

    def __post_init__(self) -> None:
        if self.updates is not None:
            _at_least("the number of updates", self.updates, 1)
        _at_least("the number of epochs", self.epochs, 1)
        _at_least("the batch size", self.batch_size, 1)
        if self.micro_batch_size is not None:
            _at_least("the micro-batch size", self.micro_batch_size, 1)
        if self.accumulate is not None:
            self._settle_accumulation(self.accumulate)
        _positive("the learning rate", self.lr)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("fused head", self.fused_head, FUSED_HEADS)
        _at_least("the number of checkpoints to keep", self.keep, 1)
        for name in self.report_to or ():
            _choice("tracker", name, TRACKERS)
            if importlib.util.find_spec(name) is None:
                raise UserError(f"--report-to {name} needs {name}: pip install {name}")
        for name in ("warmup", "eval_every", "save_every", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}, but torch takes numbers below 2 ** 63")
        for name in ("clip", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= _LARGEST):
                raise UserError(
                    f"{name} is {value}, but a finite value of at least 0 is expected, at most {_LARGEST:g}"
                )

    def _settle_accumulation(self, accumulate: int) -> None:
        _at_least("the number of micro-batches", accumulate, 1)
        size = math.ceil(self.batch_size / accumulate)
        if self.micro_batch_size not in (None, size):
            raise UserError("micro_batch_size and accumulate say the same thing; give one of them")
        object.__setattr__(self, "micro_batch_size", size)

    def micro_batch(self, ranks: int) -> int:
        """Examples of a micro-batch over all ranks: their number times `micro_batch_size`, at most the batch.

        Where `accumulate` says how many micro-batches there are, their number is the same on any number of ranks.
        """
        size = self.batch_size if self.micro_batch_size is None else self.micro_batch_size
        return min(size if self.accumulate is not None else size * ranks, self.batch_size)

    def total_updates(self, examples: int) -> int:
        """Updates of the whole run over `examples` examples; the last batch of an epoch may be a partial one."""
        return self.updates if self.updates is not None else self.epochs * math.ceil(examples / self.batch_size)


# Fields that say when something is written, not what is learned; accumulate has become the micro-batches' size.
_UNRELATED_TO_WEIGHTS = ("eval_every", "save_every", "keep", "report_to", "accumulate")


def identity(config: LossConfig | ShaPOConfig | LoopConfig) -> dict[str, Any]:
    """The fields of `config` that decide which weights a run ends with, by name."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _UNRELATED_TO_WEIGHTS}


def _choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")


def _positive(what: str, value: float | None) -> None:
    if value is None or not (math.isfinite(value) and 0 < value <= _LARGEST):
        raise UserError(f"{what} is {value}, but a finite value above 0 is expected, at most {_LARGEST:g}")


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{what} is {value}, but a whole number of at least {least} is expected")
