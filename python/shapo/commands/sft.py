"""Supervised fine-tuning on the chosen responses of preference pairs: the model that preference training starts from.

Writes to --output: metrics.jsonl (a line an update and an evaluation), run.json, model/ (Hugging Face format), and
checkpoint.pt where --save-every or Ctrl-C asked for one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.commands import common
from shapo.config import LoopConfig
from shapo.options import Group, option, read
from shapo.ranks import Ranks

SUMMARY = "supervised fine-tuning on the chosen responses"


@dataclass(frozen=True)
class SftOptions:
    """What is learned, and what is kept for evaluation."""

    responses: str = option("which responses to learn", "chosen", choices=("chosen", "both"))
    held_out: int = option("keep the last N pairs for evaluation", 0, metavar="N")


REPLACES = ("model", "metrics.jsonl", "run.json", "checkpoint*.pt")
OPTIONS = (
    Group(common.FolderOutput),
    common.MODEL,
    common.ADAPT,
    *common.DATA,
    Group(SftOptions),
    *common.loop_options("held_out", lr=1e-5, batch_size=32),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.errors import UserError
    from shapo.models.loading import load_tokenizer
    from shapo.storage.files import write_json
    from shapo.training.sft import train_sft
    from shapo.versions import versions

    config = read(LoopConfig, arguments)
    output = common.run_folder(arguments)
    pairs = list(common.load_data(arguments))
    if not 0 <= arguments.held_out < len(pairs):
        raise UserError(
            f"--held-out is {arguments.held_out}, but {len(pairs)} pairs leave room for 0 to {len(pairs) - 1}"
        )
    training, held_out = pairs[: len(pairs) - arguments.held_out], pairs[len(pairs) - arguments.held_out :]
    model, tokenizer = common.trained_model(arguments), load_tokenizer(arguments.model)
    examples = [(pair.prompt, pair.chosen) for pair in training]
    if arguments.responses == "both":
        examples += [(pair.prompt, pair.rejected) for pair in training]
    train_sft(
        model,
        common.make_encoder(arguments, tokenizer, model),
        examples,
        config=config,
        output=output,
        held_out=[(pair.prompt, pair.chosen) for pair in held_out],
        save=lambda whole: common.save_adapted(output / "model", whole, tokenizer, arguments),
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    if not Ranks.here().is_main:
        return
    write_json(output / "run.json", {"arguments": vars(arguments), "versions": versions(), "examples": len(examples)})
    common.finish_model(arguments, OPTIONS, "Supervised fine-tuned model", {"examples": len(examples)})
