"""What an update costs before anything is trained: memory by part, passes, bytes between ranks, price of each way.

A configuration suffices: --model is a folder, a config.json or the name of a model in the local cache of the hub. No
weight is loaded. An update of each way is run on tensors without contents, and what is alive at each moment is counted,
so that options act here as they do in `train`: batch, lengths, precision, checkpointing, fused head, optimizer.

Columns are the most bytes of each part, which are not all in use at the same time; `peak` is the most that is. `engine`
is what the engine adds on each rank: gathered weights, buckets, master copies. `passes` is in units of a forward pass,
`price` in plain updates, `sent` the bytes that a rank sends in an update where collectives go around a ring. The
framework itself (the CUDA context, the allocator's unused blocks, about a gigabyte) is not counted.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.commands.common import AdaptOptions, TokenOptions
from shapo.config import LoopConfig
from shapo.options import Group, option, positive_int, same

SUMMARY = "memory, passes, communication and price of an update, from a model's shapes alone"

_ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")
_OPTIMIZERS = ("adamw", "adam", "nadam", "radam", "rmsprop", "sgd", "adagrad", "adafactor")
_WAYS = ("plain", "lora", "qlora", "in_place", "delta", "reuse", "sam", "published")
_SELECTIVE = ("in_place", "delta", "reuse", "published")


@dataclass(frozen=True)
class PlanOptions:
    """What is planned."""

    model: str = option("a model folder, a config.json, or a name in the hub's local cache", metavar="NAME", reads=True)
    dtype: str = option("precision of the weights", "bfloat16", choices=("float32", "bfloat16"))
    engine: str = option("engine that divides the work over ranks", "single", choices=_ENGINES)
    ranks: int = option("number of processes, each with a device of its own", 1, parse=positive_int, metavar="N")
    device: str = option("what the devices are", "cuda", choices=("cuda", "cpu"))
    way: list[str] = option("plan only this way; may be repeated", repeated=True, choices=_WAYS)
    json: str | None = option("JSON file of the numbers, in bytes", None, metavar="FILE", writes=True)


@dataclass(frozen=True)
class UpdatePlanOptions:
    """The update, as `train` takes it."""

    batch_size: int = same(
        LoopConfig, "batch_size", default=32, parse=positive_int, help="pairs an update, of all ranks"
    )
    micro_batch_size: int | None = same(
        LoopConfig,
        "micro_batch_size",
        parse=positive_int,
        help="pairs through the model at once on a rank",
        absent="the rank's share of the batch",
        alone=None,
    )
    length: int = option("longest prompt and response together", 512, parse=positive_int, metavar="TOKENS")
    prompt_length: int | None = same(
        TokenOptions, "max_prompt_length", help="longest prompt", absent="half of --length"
    )
    optimizer: str = same(LoopConfig, "optimizer", choices=_OPTIMIZERS, help="base optimizer")
    bf16: bool = same(LoopConfig, "bf16")
    fused_head: str = same(LoopConfig, "fused_head")
    gradient_checkpointing: bool = same(AdaptOptions, "gradient_checkpointing")
    attn: str | None = same(AdaptOptions, "attn")
    lora: str | None = same(
        AdaptOptions,
        "lora",
        help="the adapter of the ways lora and qlora",
        absent="r=16, all linear layers",
        needs=("!way", "way=lora", "way=qlora"),
    )
    percent: float = option(
        "share of the neurons that ShaPO selects, in (0, 100]",
        1.0,
        needs=("!way", *(f"way={way}" for way in _SELECTIVE)),
    )
    depth: float = option(
        "reuse: share of the blocks they are selected from, from the top, in (0, 1]",
        0.25,
        needs=("!way", "way=reuse"),
    )


OPTIONS = (Group(PlanOptions), Group(UpdatePlanOptions, "update"))


def run(arguments: argparse.Namespace) -> None:
    from shapo.planning.report import make_plan, plan_lines
    from shapo.storage.files import require_writable, write_json

    output = require_writable(arguments.json) if arguments.json else None
    plan = make_plan(arguments)
    print("\n".join(plan_lines(plan)))
    if output is not None:
        write_json(output, plan)
        print(f"written: {output}")
