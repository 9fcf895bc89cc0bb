"""Options and steps that several commands share: models, data, the template, the loop, output folders."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapo import config as settings
from shapo.errors import UserError

if TYPE_CHECKING:
    from shapo.data.pairs import PairSet
    from shapo.data.tokens import PairEncoder


def add_model_arguments(parser: argparse.ArgumentParser, *, what: str = "the model", required: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=required, metavar="NAME", help=f"{what}: a local folder or a hub name")
    group.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="precision the weights are held in"
    )
    group.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1 ...")


def add_data_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, what: str = "preference pairs"
) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", required=required, metavar="SOURCE", help=f"{what}: a local file, a folder of splits or a hub name"
    )
    group.add_argument(
        "--format",
        default="auto",
        choices=("auto", "pku", "hh", "trl"),
        help="PKU-SafeRLHF, hh-rlhf or TRL columns; auto looks",
    )
    group.add_argument(
        "--preference",
        default="safer",
        choices=("safer", "better"),
        help="PKU-SafeRLHF: which of its two preferences is meant",
    )
    group.add_argument("--split", metavar="NAME", help="split of a folder or of a data set on the hub (default: train)")
    group.add_argument("--limit", type=positive_int, metavar="N", help="use the first N pairs alone (default: all)")
    add_encoder_arguments(parser)


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokens")
    group.add_argument(
        "--max-length", type=positive_int, default=512, metavar="TOKENS", help="of prompt and response together"
    )
    group.add_argument(
        "--max-prompt-length", type=positive_int, default=256, metavar="TOKENS", help="of the prompt, if cut at all"
    )
    group.add_argument("--chat-template", action="store_true", help="render prompts by the tokenizer's chat template")


def add_loop_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Options of `LoopConfig`; `defaults` replaces a command's own."""
    base = {**settings.identity(settings.LoopConfig()), "eval_every": 0, "save_every": 0, **defaults}
    group = parser.add_argument_group("loop")
    group.add_argument("--epochs", type=int, default=base["epochs"], help="passes over the data")
    group.add_argument("--updates", type=int, metavar="N", help="updates, in the place of epochs")
    group.add_argument("--batch-size", type=int, default=base["batch_size"], metavar="N", help="examples an update")
    group.add_argument(
        "--micro-batch-size", type=int, metavar="N", help="examples through the model at once (default: the batch)"
    )
    group.add_argument("--lr", type=float, default=base["lr"], help="learning rate after the warm-up")
    group.add_argument("--optimizer", default=base["optimizer"], choices=settings.OPTIMIZERS, help="base optimizer")
    group.add_argument("--weight-decay", type=float, default=base["weight_decay"], help="of the base optimizer")
    group.add_argument(
        "--warmup", type=int, default=base["warmup"], metavar="UPDATES", help="linear rise of the learning rate"
    )
    group.add_argument(
        "--schedule", default=base["schedule"], choices=settings.SCHEDULES, help="learning rate after the warm-up"
    )
    group.add_argument(
        "--clip", type=float, default=base["clip"], help="largest gradient norm (descent pass); 0 for none"
    )
    group.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 under autocast; weights stay in --dtype"
    )
    group.add_argument(
        "--fused-head",
        default=base["fused_head"],
        choices=settings.FUSED_HEADS,
        help="log-probabilities without the logits: where the model allows it, always (or an error), never",
    )
    group.add_argument("--seed", type=int, default=base["seed"], help="of data order and dropout")
    group.add_argument(
        "--eval-every",
        type=int,
        default=base["eval_every"],
        metavar="UPDATES",
        help="evaluate so often; 0: at both ends",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=base["save_every"],
        metavar="UPDATES",
        help="checkpoint so often; 0: on Ctrl-C alone",
    )
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output, bit for bit")
    group.add_argument("--overwrite", action="store_true", help="replace a finished or started run in --output")


def add_quiet_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, but a whole number of at least 1 is expected")
    return value


def radii(text: str) -> list[float]:
    """An argparse type: finite numbers above 0, separated by commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}, but numbers above 0 separated by commas are expected")
    return values


def loop_config(arguments: argparse.Namespace) -> settings.LoopConfig:
    """Raises UserError for values that cannot be."""
    return settings.LoopConfig(
        updates=arguments.updates,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        warmup=arguments.warmup,
        schedule=arguments.schedule,
        clip=arguments.clip,
        bf16=arguments.bf16,
        fused_head=arguments.fused_head,
        seed=arguments.seed,
        eval_every=arguments.eval_every,
        save_every=arguments.save_every,
    )


def run_folder(arguments: argparse.Namespace) -> Path:
    """The output folder of a training command, refused where it holds a run that nobody asked to replace.

    Raises:
        UserError: Not writable, or there is a run and neither --resume nor --overwrite.
    """
    from shapo.storage.files import require_writable
    from shapo.training.loop import METRICS

    folder = require_writable(arguments.output, folder=True)
    if (folder / METRICS).exists() and not (arguments.resume or arguments.overwrite):
        raise UserError(f"{folder} already holds a run; add --resume to go on with it or --overwrite to replace it")
    return folder


def load_model(name: str, arguments: argparse.Namespace) -> Any:
    """The model `name` in the precision and on the device of the command line."""
    from shapo.models import loading

    return loading.load_model(name, dtype=arguments.dtype, device=arguments.device)


def make_encoder(arguments: argparse.Namespace, tokenizer: Any, model: Any) -> PairEncoder:
    """The template, which refuses what `model` has no embeddings for: on a GPU that would be an assertion of CUDA's."""
    from torch import nn

    from shapo.data.tokens import PairEncoder

    learned = any(
        isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|.*position.*)$", name)
        for name, module in model.named_modules()
    )
    return PairEncoder(
        tokenizer,
        max_length=arguments.max_length,
        max_prompt_length=arguments.max_prompt_length,
        chat_template=arguments.chat_template,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        positions=getattr(model.config, "max_position_embeddings", None) if learned else None,
    )


def load_data(arguments: argparse.Namespace, *, evaluation: bool = False) -> PairSet:
    """The pairs of --data, or those of --eval-data in the same format; prints a line on what was dropped and why."""
    from shapo.data.formats import load_pairs

    prefix = "eval_" if evaluation else ""
    pairs = load_pairs(
        getattr(arguments, f"{prefix}data"),
        format=arguments.format,
        split=getattr(arguments, f"{prefix}split"),
        limit=getattr(arguments, f"{prefix}limit"),
        preference=arguments.preference,
    )
    print(pairs.summary())
    return pairs
