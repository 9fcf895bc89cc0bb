"""Supervised fine-tuning on the chosen responses of preference pairs: the model that preference training starts from.

Writes to --output: metrics.jsonl (a line an update and an evaluation), run.json, model/ (Hugging Face format), and
checkpoint.pt where --save-every or Ctrl-C asked for one.
"""

from __future__ import annotations

import argparse

from shapo.commands import common

SUMMARY = "supervised fine-tuning on the chosen responses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where everything is written")
    common.add_model_arguments(parser)
    common.add_data_arguments(parser)
    parser.add_argument("--responses", default="chosen", choices=("chosen", "both"), help="which responses to learn")
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="keep the last N pairs for evaluation")
    common.add_loop_arguments(parser, lr=1e-5, batch_size=32)
    common.add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from shapo.errors import UserError
    from shapo.models.loading import load_tokenizer, save_model
    from shapo.storage.files import write_json
    from shapo.training.sft import train_sft
    from shapo.versions import versions

    config = common.loop_config(arguments)
    output = common.run_folder(arguments)
    pairs = list(common.load_data(arguments))
    if not 0 <= arguments.held_out < len(pairs):
        raise UserError(
            f"--held-out is {arguments.held_out}, but {len(pairs)} pairs leave room for 0 to {len(pairs) - 1}"
        )
    training, held_out = pairs[: len(pairs) - arguments.held_out], pairs[len(pairs) - arguments.held_out :]
    model, tokenizer = common.load_model(arguments.model, arguments), load_tokenizer(arguments.model)
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
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    save_model(output / "model", model, tokenizer)
    write_json(output / "run.json", {"arguments": vars(arguments), "versions": versions(), "examples": len(examples)})
    print(f"model: {output / 'model'}")
