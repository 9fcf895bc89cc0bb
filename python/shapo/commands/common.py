"""Options and steps that several commands share: models, data, the template, the loop, output folders."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapo.config import LoopConfig
from shapo.errors import UserError
from shapo.options import Group, declared, option, positive_int, read
from shapo.ranks import Ranks

if TYPE_CHECKING:
    from shapo.data.pairs import PairSet
    from shapo.data.tokens import PairEncoder


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in what precision, where."""

    model: str = option("a local folder or a hub name", metavar="NAME", reads=True)
    dtype: str = option("precision of the weights", "float32", choices=("float32", "bfloat16"))
    device: str = option("auto (cuda where there is one), cpu, cuda, cuda:1 ...", "auto")


@dataclass(frozen=True)
class SourceOption:
    """Which preference pairs."""

    data: list[str] = option(
        "preference pairs: a local file, a folder of splits or a hub name; repeat it for several, as SOURCE:WEIGHT "
        "for a mixture",
        repeated=True,
        required=True,
        metavar="SOURCE",
        reads=True,
    )


@dataclass(frozen=True)
class FormatOptions:
    """How a file of preference pairs is read."""

    format: str = option(
        "PKU-SafeRLHF, hh-rlhf or TRL columns; auto detects them", "auto", choices=("auto", "pku", "hh", "trl")
    )
    preference: str = option("PKU-SafeRLHF: which of its two preferences to use", "safer", choices=("safer", "better"))
    split: str | None = option("split of a folder or of a data set on the hub", None, metavar="NAME", absent="train")
    limit: int | None = option(
        "use only the first N pairs; of a mixture N in all", None, parse=positive_int, metavar="N", absent="all"
    )
    stream: bool = option("read a data set on the hub row by row instead of downloading it first", False)


@dataclass(frozen=True)
class TokenOptions:
    """How pairs become tokens."""

    max_length: int = option("longest prompt and response together", 512, parse=positive_int, metavar="TOKENS")
    max_prompt_length: int | None = option(
        "longest prompt, where one is cut",
        None,
        parse=positive_int,
        metavar="TOKENS",
        absent="256, at most half of --max-length",
    )
    chat_template: bool = option("render prompts by the tokenizer's chat template", False)

    def prompt_length(self) -> int:
        """What is kept of a prompt that is cut."""
        return min(256, self.max_length // 2) if self.max_prompt_length is None else self.max_prompt_length


@dataclass(frozen=True)
class RunOptions:
    """What a training command does with a run that is there already."""

    resume: bool = option("continue from the checkpoint in --output, bit for bit", False, alone="existing")
    overwrite: bool = option("replace a finished or started run in --output", False, alone="existing")
    push_to_hub: str | None = option(
        "upload the model to this repository of the hub, made private if it is new", None, metavar="OWNER/NAME"
    )


@dataclass(frozen=True)
class AdaptOptions:
    """What of the model is trained, and how its memory is kept small."""

    lora: str | None = option(
        "train an adapter (PEFT) instead of the weights: r=16,alpha=32,dropout=0,targets=q_proj,v_proj",
        None,
        metavar="SPEC",
        absent="all weights; targets: all linear layers",
        alone="adapted",
    )
    qlora: str | None = option(
        "the same on a base model in 4 bits (bitsandbytes, NF4); see --lora",
        None,
        metavar="SPEC",
        absent="no",
        alone="adapted",
    )
    adapter: str | None = option(
        "--lora, --qlora: save the model with the adapter merged into it, or only the adapter",
        None,
        choices=("merged", "apart"),
        absent="merged",
        needs=("lora", "qlora"),
    )
    gradient_checkpointing: bool = option(
        "keep only each block's input and recompute the rest: less memory, more time", False
    )
    attn: str | None = option(
        "attention: eager, sdpa, flash_attention_2 ...", None, metavar="NAME", absent="transformers' choice"
    )


@dataclass(frozen=True)
class FolderOutput:
    """Where a command of several files writes."""

    output: str = option("where everything is written", metavar="FOLDER", fills=True)


@dataclass(frozen=True)
class FileOutput:
    """Where a command of one file writes."""

    output: str = option("JSON file of the results", metavar="FILE", writes=True)


@dataclass(frozen=True)
class QuietOption:
    """For all commands that take a while."""

    quiet: bool = option("no progress bars", False)


ADAPT = Group(AdaptOptions, "model")
MODEL, TOKENS, QUIET = Group(ModelOptions, "model"), Group(TokenOptions, "tokens"), Group(QuietOption)
DATA = (Group(SourceOption, "data"), Group(FormatOptions, "data"), TOKENS)


def loop_options(*evaluated: str, **defaults: Any) -> tuple[Group, Group]:
    """The options of the training loop with a command's own defaults; --eval-every needs one of `evaluated`."""
    needs = {"eval_every": evaluated, "keep": ("save_every",)}
    return Group(LoopConfig, "loop", defaults=defaults, needs=needs), Group(RunOptions, "loop")


def needing(table: type, *conditions: str) -> dict[str, tuple[str, ...]]:
    """The same conditions for all options of a table; see `shapo.needs`."""
    return {field.name: conditions for field, _ in declared(table).values()}


def run_folder(arguments: argparse.Namespace) -> Path:
    """The output folder of a training command, refused where it holds a run that nobody asked to replace; on every
    rank (a collective), as rank 0 finds it.

    Raises:
        UserError: Not writable, or there is a run and neither --resume nor --overwrite.
    """
    from shapo.storage.files import require_writable
    from shapo.training.loop import CHECKPOINT, METRICS

    def find() -> Path:
        folder = require_writable(arguments.output, folder=True)
        if (folder / METRICS).exists() and not (arguments.resume or arguments.overwrite):
            resumable = "--resume goes on with it, " if (folder / CHECKPOINT).exists() else ""
            raise UserError(f"{folder} already holds a run; {resumable}--overwrite replaces it")
        return folder

    return Ranks.here().on_main(find)


def load_model(name: str, arguments: argparse.Namespace, *, slow: bool = True) -> Any:
    """The model `name` in the precision and on the device of the command line; `slow` if it is to compute much."""
    from shapo.models import loading

    model = loading.load_model(name, dtype=arguments.dtype, device=arguments.device)
    if slow and not getattr(arguments, "bf16", True):
        loading.hint_at_bf16(model)
    return model


def trained_model(arguments: argparse.Namespace) -> Any:
    """The model as --attn, --lora or --qlora, and --gradient-checkpointing want it trained (a collective).

    Rank 0 alone reads it; on the others its weights are on the meta device.

    Raises:
        UserError: transformers cannot give it, or see `load_model` and `add_lora`.
    """
    from shapo.libraries.accelerate import shards_weights
    from shapo.models import adapters, blocks, loading
    from shapo.models.spread import read_once

    ranks = Ranks.here()
    if ranks.count > 1 and arguments.qlora is not None:
        raise UserError("--qlora runs in one process; on several ranks use --lora")
    # A model that is going to be sharded may be too large for one GPU.
    device = "cpu" if ranks.count > 1 and shards_weights() else arguments.device

    def read_model() -> Any:
        model = loading.load_model(
            arguments.model, dtype=arguments.dtype, device=device, four_bit=arguments.qlora is not None
        )
        if not arguments.bf16:
            loading.hint_at_bf16(model)
        if arguments.attn:
            blocks.set_attention(model, arguments.attn)
        if spec := arguments.lora or arguments.qlora:
            model = adapters.add_lora(model, adapters.Lora.parse(spec), seed=arguments.seed)
        return model

    model = read_once(ranks, read_model)
    if arguments.gradient_checkpointing:
        blocks.checkpoint_blocks(model)
    return model


def save_adapted(folder: Path, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Saves a trained model, its adapter merged into it or (--adapter apart) alone."""
    from shapo.models import adapters, loading

    if arguments.adapter == "apart":
        loading.save_model(folder, model, tokenizer)
    elif arguments.qlora:
        # Added to the weights as they were before they were rounded to 4 bits, which would round it away too.
        with tempfile.TemporaryDirectory() as apart:
            loading.save_model(Path(apart) / "adapter", model, tokenizer)
            whole = loading.merged_adapter(Path(apart) / "adapter", dtype=arguments.dtype)
        loading.save_model(folder, whole, tokenizer)
    else:
        with adapters.merged(model) as (whole, weights):
            loading.save_model(folder, whole, tokenizer, weights)


def finish_model(arguments: argparse.Namespace, groups: Sequence[Group], title: str, numbers: dict[str, Any]) -> None:
    """What lies beside a trained model in the end: its card, and on the hub what --push-to-hub asked for."""
    from shapo import recipe
    from shapo.models import card
    from shapo.versions import versions

    folder = Path(arguments.output) / "model"
    card.write_card(folder, title=title, recipe=recipe.merged(arguments, groups), numbers=numbers, versions=versions())
    print(f"model: {folder}")
    if arguments.push_to_hub:
        print(f"pushed: {card.push(folder, arguments.push_to_hub)}")


def make_encoder(arguments: argparse.Namespace, tokenizer: Any, model: Any) -> PairEncoder:
    """The template, which refuses what `model` has no embeddings for: on a GPU that would be an assertion of CUDA's."""
    from shapo.data.tokens import PairEncoder
    from shapo.models.architectures import learned_positions
    from shapo.notes import note

    if getattr(tokenizer, "chat_template", None) and not arguments.chat_template:
        note("the tokenizer has a chat template, which chat models are trained with; --chat-template uses it")
    embeddings = len(model.get_input_embeddings().weight)
    encoder = PairEncoder(
        tokenizer,
        max_length=arguments.max_length,
        max_prompt_length=read(TokenOptions, arguments).prompt_length(),
        chat_template=arguments.chat_template,
        vocabulary=embeddings,
        positions=learned_positions(model),
    )
    if not 0 <= encoder.pad_token_id < embeddings:
        raise UserError(
            f"the tokenizer pads with id {encoder.pad_token_id}, but the model has {embeddings} token embeddings; "
            "give the tokenizer another pad_token"
        )
    return encoder


def load_data(arguments: argparse.Namespace, *, evaluation: bool = False) -> PairSet:
    """The pairs of --data, or those of --eval-data in the same format; prints a line on what was dropped and why."""
    if evaluation:
        pairs = load_sources([arguments.eval_data], arguments, split=arguments.eval_split, limit=arguments.eval_limit)
    else:
        pairs = load_sources(arguments.data, arguments)
    print(pairs.summary())
    return pairs


def load_sources(sources: Sequence[str], arguments: argparse.Namespace, **changes: Any) -> PairSet:
    """The pairs of some sources, read as the options for data say."""
    from shapo.data.mixture import load_mixture, parse_source

    if arguments.stream and all(Path(parse_source(source)[0]).exists() for source in sources):
        raise UserError(f"--stream has no effect on {sources[0]}: it reads a data set on the hub row by row")
    options = {name: getattr(arguments, name) for name in ("format", "split", "limit", "preference", "stream")}
    return load_mixture(sources, **{**options, **changes})
