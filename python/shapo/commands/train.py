"""Preference training: any loss, mean or Dr.DPO, plain or ShaPO.

Plain training is the default; --rho makes it ShaPO, inside --subspace (a file from `shapo select`) or in all parameters
(--subspace full).  Radii are in weight units; with --relative-rho they are multiples of ||W_S||, the norm of the
selected weights, which is printed either way because a radius says little without it.

The reward level (--loss reward_level) takes its labels from --reward-model in the place of the data's, at any
aggregation, plain or ShaPO. The model that training starts from is the reference; it is asked once, before the first
update, and so is the reward model.

Writes to --output: metrics.jsonl, run.json, reference.safetensors, rewards.safetensors, model/, and checkpoint.pt where
--save-every or Ctrl-C asked for one.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shapo import config as settings
from shapo.commands import common

if TYPE_CHECKING:
    from pathlib import Path

    from shapo.data.pairs import PreferencePair
    from shapo.scoring.rewards import PairRewards

SUMMARY = "preference training, plain or with ShaPO"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where everything is written")
    common.add_model_arguments(parser, what="the model to start from, which is the reference too")
    common.add_data_arguments(parser)
    parser.add_argument("--eval-data", metavar="SOURCE", help="clean pairs to evaluate on, in the same format")
    parser.add_argument("--eval-split", metavar="NAME", help="split of --eval-data on the hub")
    parser.add_argument(
        "--eval-limit", type=common.positive_int, metavar="N", help="evaluate on the first N of them alone"
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="SHARE", help="flip this share of the training labels, 0 to 1"
    )
    parser.add_argument("--noise-seed", type=int, default=0, help="which labels are flipped")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss", default="dpo", choices=settings.LOSSES, help="formulas: docs/losses.md")
    loss.add_argument("--beta", type=float, default=0.1, help="inverse temperature of the implicit reward")
    loss.add_argument(
        "--epsilon", type=float, help="cdpo, rdpo: assumed share of flipped labels, in [0, 0.5) (default: 0.1)"
    )
    loss.add_argument("--gamma", type=float, help="simpo: target margin (default: 0.5)")
    loss.add_argument(
        "--aggregation", default="mean", choices=settings.AGGREGATIONS, help="how a batch's pairs come together"
    )
    loss.add_argument("--beta-prime", type=float, help="drdpo: its temperature, in nats (default: 1)")
    loss.add_argument(
        "--reward-model", metavar="NAME", help="reward_level: a sequence-classification model, folder or hub name"
    )
    loss.add_argument(
        "--reward-sign",
        choices=("reward", "cost"),
        help="reward_level: is a higher score better or worse (default: reward)",
    )
    loss.add_argument("--beta-reward", type=float, help="reward_level: scale of the reward difference (default: 10)")

    shapo = parser.add_argument_group("ShaPO")
    shapo.add_argument(
        "--rho",
        type=_radius,
        metavar="RHO",
        help="radius of the perturbation; makes the run a ShaPO run (low,high: with --norm none)",
    )
    shapo.add_argument(
        "--relative-rho", action="store_true", help="--rho is a multiple of the norm of the selected weights"
    )
    shapo.add_argument("--subspace", metavar="FILE", help="a file of `shapo select`, or full for all parameters")
    shapo.add_argument("--interval", type=int, help="a ShaPO update every N updates, plain ones between (default: 1)")
    shapo.add_argument(
        "--plain-updates", type=int, metavar="N", help="plain updates before the first ShaPO update (default: 0)"
    )
    shapo.add_argument(
        "--rho-warmup", type=int, metavar="N", help="then a linear rise of rho over N updates (default: 0)"
    )
    shapo.add_argument(
        "--ascent",
        choices=settings.ASCENTS,
        help="gradient of the selected neurons alone, or .grad (default: selective)",
    )
    part = shapo.add_mutually_exclusive_group()
    part.add_argument(
        "--ascent-fraction", type=float, help="share of a batch's pairs for the ascent, in (0, 1] (default: 1)"
    )
    part.add_argument(
        "--ascent-pairs", type=int, metavar="N", help="number of a batch's pairs for the ascent (default: all)"
    )
    shapo.add_argument(
        "--per-micro-batch",
        action="store_true",
        default=None,
        help="a perturbation for each micro-batch, from its own ascent (default: one for the batch)",
    )
    shapo.add_argument(
        "--perturbation", choices=settings.PERTURBATIONS, help="write the weights or add in the forward (default: auto)"
    )
    shapo.add_argument(
        "--norm", choices=settings.NORMS, help="over all layers, layer by layer, or none (default: global)"
    )

    common.add_loop_arguments(parser, lr=5e-7, batch_size=32, clip=10.0, optimizer="rmsprop")
    common.add_quiet_argument(parser)


def _radius(text: str) -> float | tuple[float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r}, but a number, or low,high, is expected")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def run(arguments: argparse.Namespace) -> None:
    from shapo.errors import UserError
    from shapo.models.loading import load_tokenizer, save_model
    from shapo.versions import versions

    if not arguments.eval_data and (arguments.eval_limit or arguments.eval_split):
        raise UserError("--eval-limit and --eval-split say which part of --eval-data; give that too")
    loop, loss, shapo = common.loop_config(arguments), _loss_config(arguments), _shapo_config(arguments)
    output = common.run_folder(arguments)

    from shapo.data.noise import flip_labels
    from shapo.scoring.logps import TokenizedPairs
    from shapo.storage.files import write_json
    from shapo.training.preference import train_preferences
    from shapo_kernels import Subspace

    subspace = Subspace.load(arguments.subspace) if shapo and arguments.subspace != "full" else None
    pairs = flip_labels(list(common.load_data(arguments)), arguments.noise, seed=arguments.noise_seed)
    held_out = common.load_data(arguments, evaluation=True) if arguments.eval_data else []
    model, tokenizer = common.load_model(arguments.model, arguments), load_tokenizer(arguments.model)
    if shapo and subspace is None:
        subspace = Subspace.full(model)
    if subspace is not None:
        subspace.validate(model)
    rewards = _rewards(arguments, pairs, output) if loss.uses_rewards else None
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
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    save_model(output / "model", model, tokenizer)
    write_json(output / "run.json", {"arguments": vars(arguments), "versions": versions(), **summary})
    if summary["rho_over_weight_norm"] is not None:
        print(f"||eps|| / ||W_S||: {summary['rho_over_weight_norm']:.4g}")
    for name, value in summary["final"].items():
        print(f"{name}: {value:.4g}")
    print(f"model: {output / 'model'}")


def _loss_config(arguments: argparse.Namespace) -> settings.LossConfig:
    from shapo.errors import UserError

    config = settings.LossConfig(
        name=arguments.loss,
        beta=arguments.beta,
        epsilon=arguments.epsilon,
        gamma=arguments.gamma,
        beta_reward=arguments.beta_reward,
        aggregation=arguments.aggregation,
        beta_prime=arguments.beta_prime,
    )
    if config.uses_rewards and not arguments.reward_model:
        raise UserError("--loss reward_level takes its labels from a reward model; name one with --reward-model")
    if not config.uses_rewards and (arguments.reward_model or arguments.reward_sign):
        raise UserError(f"--reward-model and --reward-sign are options of --loss reward_level, not of {config.name}")
    return config


def _shapo_config(arguments: argparse.Namespace) -> settings.ShaPOConfig | None:
    from shapo.errors import UserError

    names = (
        *("interval", "plain_updates", "rho_warmup", "ascent", "ascent_fraction", "ascent_pairs", "per_micro_batch"),
        *("perturbation", "norm"),
    )
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.rho is None:
        useless = [*given, *(name for name in ("subspace", "relative_rho") if getattr(arguments, name))]
        if useless:
            raise UserError(f"--{useless[0].replace('_', '-')} is an option of ShaPO; give the radius with --rho too")
        return None
    if not arguments.subspace:
        raise UserError("--rho needs --subspace: a file of `shapo select`, or full for all parameters")
    return settings.ShaPOConfig(rho=arguments.rho, relative=arguments.relative_rho, **given)


def _rewards(arguments: argparse.Namespace, pairs: list[PreferencePair], output: Path) -> PairRewards:
    from shapo.models.loading import device_of
    from shapo.scoring.rewards import load_reward_scorer

    scorer = load_reward_scorer(
        arguments.reward_model, sign=arguments.reward_sign or "reward", device=device_of(arguments.device)
    )
    rewards = scorer.cached_pairs(output / "rewards.safetensors", pairs, progress=not arguments.quiet)
    print(f"the rewards agree with {100 * rewards.agreement():.1f} % of the training labels")
    return rewards
