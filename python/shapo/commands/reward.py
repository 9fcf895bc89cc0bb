"""Makes a reward model for the reward level: a language model as it is, with a linear head fitted to clean preferences.

The head is fitted by Bradley-Terry on --data, pairs that neither training nor evaluation sees; its accuracy is that on
held-out prompts. With --eval-data the soft labels sigmoid(beta_r (r_chosen - r_rejected)) of those pairs are drawn for
several --betas (Figure 5 of the paper). Where most of them are near 0 or 1 the reward level is no softer than labels.
Texts are rendered by the tokenizer's chat template, where it has one; there is no option for it.

Writes to --output: model/ (for `shapo train --reward-model`), reward.json, soft_labels.png.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.commands import common
from shapo.options import Group, option, radii

SUMMARY = "fit a reward model's head to clean preferences"


@dataclass(frozen=True)
class RewardOptions:
    """What is measured."""

    eval_data: str | None = option(
        "pairs whose soft labels are drawn", None, metavar="SOURCE", absent="--data", reads=True
    )
    betas: list[float] = option("beta_r of the histograms", (0.3, 1.0, 3.0, 10.0), parse=radii)
    max_length: int = option("longest prompt and response together", 1024, metavar="TOKENS")
    batch_size: int = option("responses at once", 16, metavar="N")


REPLACES = ("model", "reward.json", "soft_labels.png")
OPTIONS = (
    Group(common.FolderOutput),
    common.MODEL,
    Group(common.SourceOption, "data"),
    Group(common.FormatOptions, "data"),
    Group(RewardOptions, "reward"),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.models.loading import load_tokenizer, save_model
    from shapo.plots import plot_soft_labels
    from shapo.scoring.reward_head import fit_reward_head, reward_model_of, saturated, sharpness_hint, soft_labels
    from shapo.scoring.rewards import RewardScorer
    from shapo.storage.files import require_writable, write_json
    from shapo.tables import table
    from shapo.versions import versions

    output = require_writable(arguments.output, folder=True)
    pairs = common.load_data(arguments)
    tokenizer = load_tokenizer(arguments.model)
    model = reward_model_of(common.load_model(arguments.model, arguments))
    scorer = RewardScorer(model, tokenizer, max_length=arguments.max_length, batch_size=arguments.batch_size)
    fit = fit_reward_head(scorer, pairs, progress=not arguments.quiet)
    shown = (
        common.load_sources([arguments.eval_data], arguments, split=None, limit=None) if arguments.eval_data else pairs
    )
    rewards = scorer.score_pairs(shown, progress=not arguments.quiet)
    labels = {beta: soft_labels(rewards, beta) for beta in arguments.betas}
    save_model(output / "model", model, tokenizer)
    plot_soft_labels(output / "soft_labels.png", labels, title=f"soft labels of {len(shown)} pairs")
    result = {
        "accuracy_on_held_out_prompts": fit.accuracy,
        "penalty": fit.penalty,
        "pairs": fit.pairs,
        "agreement": rewards.agreement(),
        "saturated": {f"{beta:g}": saturated(rewards, beta) for beta in arguments.betas},
        "suggested_beta_reward": sharpness_hint(rewards),
    }
    write_json(output / "reward.json", {"arguments": vars(arguments), "versions": versions(), **result})
    print(
        f"right on {100 * fit.accuracy:.1f} % of {fit.pairs} pairs of held-out prompts; agrees with "
        f"{100 * rewards.agreement():.1f} % of the labels of {'--eval-data' if arguments.eval_data else '--data'}"
    )
    rows = [(f"{beta:g}", f"{100 * saturated(rewards, beta):.1f} %") for beta in arguments.betas]
    print(table(("beta_r", "soft labels within 0.01 of 0 or 1"), rows))
    print(f"the median pair has the soft label 0.9 or 0.1 at --beta-reward {sharpness_hint(rewards):.3g}")
    print(f"reward model: {output / 'model'}")
