"""Preference training: any loss, mean or Dr.DPO, plain or ShaPO.

Plain training is the default; --rho makes it ShaPO, inside --subspace (a file from `shapo select`), in all parameters
(--subspace full), the output projection (head) or the adapters of --lora (adapters).  Radii are in weight units; with
--relative-rho they are multiples of ||W_S||, the norm of the selected weights, which is printed either way because a
radius says little without it.

The reward level (--loss reward_level) takes its labels from --reward-model and not from the data, at any aggregation,
plain or ShaPO. The model that training starts from is the reference. It and the reward model are run once, before the
first update.

Writes to --output: metrics.jsonl, run.json, reference.safetensors, rewards.safetensors, model/, and checkpoint.pt where
--save-every or Ctrl-C asked for one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shapo.commands import common
from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.errors import UserError
from shapo.notes import note
from shapo.options import Group, option, positive_int, read, seed_number
from shapo.ranks import Ranks

if TYPE_CHECKING:
    from pathlib import Path

    from shapo.data.pairs import PreferencePair
    from shapo.scoring.rewards import PairRewards

SUMMARY = "preference training, plain or with ShaPO"


@dataclass(frozen=True)
class HeldOutOptions:
    """Clean pairs to evaluate on, and label noise for the others."""

    eval_data: str | None = option("clean pairs to evaluate on, in the same format", None, metavar="SOURCE", reads=True)
    eval_split: str | None = option("split of --eval-data", None, metavar="NAME", needs=("eval_data",))
    eval_limit: int | None = option(
        "evaluate on only the first N of them", None, parse=positive_int, metavar="N", needs=("eval_data",)
    )
    noise: float = option("flip this share of the training labels, 0 to 1", 0.0, metavar="SHARE")
    noise_seed: int = option("which labels are flipped", 0, parse=seed_number, metavar="N", needs=("noise",))


@dataclass(frozen=True)
class RewardOptions:
    """Where the reward level takes its labels from."""

    reward_model: str | None = option(
        "a sequence-classification model, folder or hub name", None, of=("reward_level",), metavar="NAME", reads=True
    )
    reward_sign: str | None = option(
        "whether a higher score is better (reward) or worse (cost)",
        None,
        of=("reward_level",),
        choices=("reward", "cost"),
        absent="reward",
    )


@dataclass(frozen=True)
class SubspaceOption:
    """Where weights are perturbed."""

    subspace: str | None = option(
        "a file of `shapo select`, or: full (all parameters), head (output projection), adapters (of --lora)",
        None,
        metavar="FILE",
        reads=True,
    )


REPLACES = (
    "model",
    "metrics.jsonl",
    "run.json",
    "checkpoint*.pt",
    "reference.safetensors",
    "reference-evaluation.safetensors",
    "rewards.safetensors",
)
_OF_SHAPO = ("rho=*",)
OPTIONS = (
    Group(common.FolderOutput),
    Group(
        common.ModelOptions,
        "model",
        helps={"model": "the model to start from, also the reference: a local folder or a hub name"},
    ),
    common.ADAPT,
    *common.DATA,
    Group(HeldOutOptions),
    Group(LossConfig, "loss"),
    Group(RewardOptions, "loss"),
    Group(SubspaceOption, "ShaPO", needs={"subspace": _OF_SHAPO}),
    Group(
        ShaPOConfig,
        "ShaPO",
        given_only=True,
        needs={
            **common.needing(ShaPOConfig, *_OF_SHAPO),
            "rho": (),
            "per_micro_batch": ("rho=*+micro_batch_size", "rho=*+accumulate"),
        },
    ),
    *common.loop_options("eval_data", "noise", lr=5e-7, batch_size=32, clip=10.0, optimizer="rmsprop"),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    loop, loss, shapo = read(LoopConfig, arguments), _loss_config(arguments), _shapo_config(arguments)
    output = common.run_folder(arguments)

    from shapo.data.noise import flip_labels
    from shapo.models.adapters import adapters_subspace
    from shapo.models.loading import load_tokenizer
    from shapo.scoring.logps import TokenizedPairs
    from shapo.storage.files import write_json
    from shapo.training.preference import train_preferences
    from shapo.versions import versions
    from shapo_kernels import Subspace

    named = {"full": Subspace.full, "head": Subspace.head, "adapters": adapters_subspace}
    subspace = Subspace.load(arguments.subspace) if shapo and arguments.subspace not in named else None
    pairs = flip_labels(list(common.load_data(arguments)), arguments.noise, seed=arguments.noise_seed)
    held_out = common.load_data(arguments, evaluation=True) if arguments.eval_data else []
    model, tokenizer = common.trained_model(arguments), load_tokenizer(arguments.model)
    if shapo and subspace is None:
        subspace = named[arguments.subspace](model)
    if subspace is not None:
        subspace.validate(model)
    rewards = _rewards(arguments, pairs, output, loss.beta_reward or 1.0) if loss.uses_rewards else None
    encoder = common.make_encoder(arguments, tokenizer, model)
    summary = train_preferences(
        model,
        TokenizedPairs(pairs, encoder),
        loss=loss,
        loop=loop,
        shapo=shapo,
        subspace=subspace,
        rewards=rewards,
        evaluation=TokenizedPairs(held_out, encoder) if held_out else None,
        output=output,
        save=lambda whole: common.save_adapted(output / "model", whole, tokenizer, arguments),
        resume=arguments.resume,
        progress=not arguments.quiet,
        about={"arguments": vars(arguments), "versions": versions()},
    )
    if not Ranks.here().is_main:
        return
    write_json(output / "run.json", {"arguments": vars(arguments), "versions": versions(), **summary})
    if summary["rho_over_weight_norm"] is not None:
        print(f"||eps|| / ||W_S||: {summary['rho_over_weight_norm']:.4g}")
        if arguments.norm == "none" and summary["rho_over_weight_norm"] < 1e-5:
            note("the perturbation is next to nothing here; see recipe shapo-probe")
    for name, value in summary["final"].items():
        print(f"{name}: {value:.4g}")
    measured = {name: summary[name] for name in ("updates", "seconds_per_update", "rho_over_weight_norm", "flipped")}
    numbers = {**{name: value for name, value in measured.items() if value is not None}, **summary["final"]}
    common.finish_model(arguments, OPTIONS, "ShaPO model" if shapo else "Preference-trained model", numbers)


def _loss_config(arguments: argparse.Namespace) -> LossConfig:
    config = read(LossConfig, arguments)
    if config.uses_rewards and not arguments.reward_model:
        raise UserError("--loss reward_level takes its labels from a reward model; name one with --reward-model")
    if not config.uses_rewards and (arguments.reward_model or arguments.reward_sign):
        raise UserError(f"--reward-model and --reward-sign are options of --loss reward_level, not of {config.name}")
    return config


def _shapo_config(arguments: argparse.Namespace) -> ShaPOConfig | None:
    if arguments.rho is None:
        return None
    if not arguments.subspace:
        where = f"rho (of the recipe {arguments.config}, or --rho)" if arguments.config else "--rho"
        raise UserError(f"{where} needs --subspace: a file of `shapo select`, or full for all parameters")
    return read(ShaPOConfig, arguments)


def _warn_of_saturation(rewards: PairRewards, beta_reward: float) -> None:
    from shapo.scoring.reward_head import saturated, sharpness_hint

    share = saturated(rewards, beta_reward)
    if share > 0.5:
        note(
            f"{100 * share:.0f} % of the soft labels are within 0.01 of 0 or 1, so the reward level is hardly softer "
            f"than labels; with --beta-reward {sharpness_hint(rewards):.2g} the median pair's would be 0.9 or 0.1"
        )


def _rewards(
    arguments: argparse.Namespace, pairs: list[PreferencePair], output: Path, beta_reward: float
) -> PairRewards:
    from shapo.models.loading import device_of
    from shapo.scoring.rewards import load_reward_scorer

    scorer = load_reward_scorer(
        arguments.reward_model, sign=arguments.reward_sign or "reward", device=device_of(arguments.device)
    )
    rewards = scorer.cached_pairs(
        output / "rewards.safetensors", pairs, progress=not arguments.quiet, ranks=Ranks.here()
    )
    print(f"the rewards agree with {100 * rewards.agreement():.1f} % of the training labels")
    _warn_of_saturation(rewards, beta_reward)
    return rewards
