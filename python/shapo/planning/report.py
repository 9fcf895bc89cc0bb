"""`shapo plan`: options in, numbers for JSON out, and a table of them for people."""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shapo.config import LoopConfig
from shapo.errors import UserError, first_line
from shapo.models.adapters import Lora
from shapo.planning import engines
from shapo.planning.tracing import PARTS
from shapo.planning.updates import WAYS, Load, Update, trace_update
from shapo.tables import table

_GIB = 2**30


def make_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of every way, in bytes.

    Raises:
        UserError: No configuration, or options that do not belong together.
    """
    engine, ranks = arguments.engine, arguments.ranks
    if engine == "single" and ranks > 1:
        raise UserError(f"--ranks is {ranks}, but one process needs no engine; name it with --engine")
    for name, most in (("percent", 100), ("depth", 1)):
        if not 0 < getattr(arguments, name) <= most:
            raise UserError(f"--{name} is {getattr(arguments, name)}, but a share in (0, {most}] is expected")
    config, load = read_config(arguments.model), _load(arguments)
    possible = engines.ways_under(engine)
    without = () if find_spec("bitsandbytes") else ("qlora",)
    ways = arguments.way or [way for way in possible if way not in without]
    for way in ways:
        if way not in possible:
            raise UserError(f"--way {way} cannot run under {engine}, which allows {', '.join(possible)}")
    with _quietly():
        updates = {way: trace_update(config, way, load) for way in dict.fromkeys(ways)}
        plain = updates.get("plain") or trace_update(config, "plain", load)
    return {
        "model": arguments.model,
        "architecture": type(config).__name__.removesuffix("Config"),
        "parameters": plain.parameters,
        "engine": engine,
        "ranks": ranks,
        "pairs_at_once": load.pairs,
        "micro_batches": load.micro_batches,
        "length": load.length,
        "prompt_length": load.prompt,
        "dtype": load.dtype,
        "ways": {way: _numbers(update, plain, engine, ranks) for way, update in updates.items()},
    }


def _numbers(update: Update, plain: Update, engine: str, ranks: int) -> dict[str, Any]:
    own, crossed = engines.buffers(engine, ranks, update), engines.sent(engine, ranks, update)
    largest = {**update.largest, "engine": own.always + own.in_passes}
    peak = {part: round(size) for part, size in engines.peak(engine, ranks, update).items()}
    return {
        "what": WAYS[update.way],
        "largest": {part: round(size) for part, size in largest.items()},
        "at_the_peak": peak,
        "peak": sum(peak.values()),
        "flops": update.flops,
        "passes": update.passes,
        "price": update.flops / plain.flops,
        "collectives": vars(crossed),
        "sent": round(crossed.on_a_ring(ranks)),
    }


def plan_lines(plan: dict[str, Any], *, markdown: bool = False) -> list[str]:
    """The plan for people, sizes in GiB."""
    parts = [*PARTS, "engine"] if plan["engine"] != "single" else list(PARTS)
    header = ["way", *parts, "peak", "passes", "price", "sent"]
    rows = [
        [
            way,
            *(_size(found["largest"][part]) for part in parts),
            _size(found["peak"]),
            f"{found['passes']:.2f}",
            f"{found['price']:.2f}",
            _size(found["sent"]),
        ]
        for way, found in plan["ways"].items()
    ]
    ranks, at_once = plan["ranks"], plan["pairs_at_once"]
    times = "" if plan["micro_batches"] == 1 else f" {plan['micro_batches']} times"
    title = (
        f"{plan['architecture']}, {plan['parameters'] / 1e9:.2f} billion weights in {plan['dtype']}; "
        f"{'one process' if ranks == 1 else f'{ranks} ranks under ' + plan['engine']}, {at_once} pairs of "
        f"{plan['length']} tokens at once{times}. Each rank, GiB:"
    )
    if markdown:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return [title, "", *("| " + " | ".join(line) + " |" for line in lines)]
    legend = [f"  {way}: {found['what']}" for way, found in plan["ways"].items()]
    return [title, "", table(header, rows), "", *legend]


def _size(count: float) -> str:
    size = count / _GIB
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"


def read_config(name: str) -> Any:
    """A transformers configuration, from files of this machine alone.

    Raises:
        UserError: There is none, or it is damaged.
    """
    from transformers import AutoConfig

    path = Path(name)
    if not path.exists() and name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: there is no such folder or file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model {name}: the folder has no config.json")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except Exception as error:  # the hub and configuration classes each raise their own kinds
        where = "" if path.exists() else " in the hub's local cache; give a folder or a config.json"
        raise UserError(f"no configuration of --model {name} can be read{where}: {first_line(error)}") from error


def _load(arguments: argparse.Namespace) -> Load:
    each = math.ceil(arguments.batch_size / arguments.ranks)
    pairs = min(each, arguments.micro_batch_size or each)
    prompt = arguments.length // 2 if arguments.prompt_length is None else arguments.prompt_length
    if not prompt < arguments.length:
        raise UserError(f"--prompt-length is {prompt} and --length {arguments.length}; expected prompt < whole")
    if pairs * arguments.length > 2**30:
        raise UserError(f"{pairs} pairs of {arguments.length} tokens at once are over a billion tokens; lower them")
    return Load(
        pairs=pairs,
        micro_batches=math.ceil(each / pairs),
        length=arguments.length,
        prompt=prompt,
        dtype=arguments.dtype,
        loop=LoopConfig(optimizer=arguments.optimizer, bf16=arguments.bf16, fused_head=arguments.fused_head),
        gradient_checkpointing=arguments.gradient_checkpointing,
        attn=arguments.attn,
        lora=Lora() if arguments.lora is None else Lora.parse(arguments.lora),
        percent=arguments.percent,
        depth=arguments.depth,
        foreach=arguments.device == "cuda",
        shares=engines.shares(arguments.engine, arguments.ranks),
        zero=engines.zero_stage(arguments.engine),
        ranks=arguments.ranks,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what libraries remark about tensors without contents."""
    from shapo.models.loading import quiet_transformers

    quiet_transformers()
    earlier = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(earlier)
