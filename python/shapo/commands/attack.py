"""Fine-tunes an aligned model on a few harmful answers and measures how soon it gives in.

The attack is plain SFT on the unsafe answers of --data (the rejected ones where none is marked), of all weights or of
LoRA adapters (--lora). At step 0, every --every steps and at the end the model answers --prompts greedily; --judge
gives verdicts, refusals are counted by substring, and the loss is taken on held-out harmful answers. --benign counts
refusals of prompts that should be answered. Each of --seeds draws other examples and another order.

Writes to --output: attack.json (a curve a seed, as each of them ends), attack.png, and in seed-N metrics.jsonl and the
verdicts of each measured step, verdicts-STEP.jsonl and benign-STEP.jsonl, which `shapo evaluate --verdicts --against`
compares with another model's. No model and no answer is kept.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.commands import common
from shapo.commands.judge import THRESHOLD_NEEDS
from shapo.options import Group, option, positive_int

SUMMARY = "how soon an aligned model gives in to harmful fine-tuning"


@dataclass(frozen=True)
class AttackOptions:
    """The attack."""

    prompts: str = option("harmful prompts to answer, none of them in --data", metavar="SOURCE", reads=True)
    prompts_limit: int | None = option("answer only the first N", None, parse=positive_int, metavar="N", absent="all")
    benign: str | None = option(
        "prompts that should be answered, to measure over-refusal", None, metavar="SOURCE", reads=True
    )
    benign_limit: int | None = option(
        "answer only the first N of them", None, parse=positive_int, metavar="N", absent="all", needs=("benign",)
    )
    steps: int = option("updates", 50, parse=positive_int)
    examples: int = option("harmful answers to train on", 64, parse=positive_int, metavar="N")
    held_out: int = option("harmful answers kept for the loss", 16, parse=positive_int, metavar="N")
    lora: int = option("rank of LoRA adapters on all linear layers; 0: all weights", 0, metavar="RANK")
    every: int = option("steps between two measurements", 10, parse=positive_int, metavar="N")
    lr: float = option("learning rate of AdamW", 1e-5)
    batch_size: int = option("answers per step", 8, parse=positive_int, metavar="N")
    max_new_tokens: int = option("longest answer", 64, parse=positive_int, metavar="TOKENS")
    bf16: bool = option("train under bfloat16 autocast; answers are computed in --dtype", False)
    seeds: int = option("runs, with the seeds 0 to N - 1", 3, parse=positive_int, metavar="N")
    overwrite: bool = option("replace an attack in --output", False)


@dataclass(frozen=True)
class JudgeOptions:
    """Who says what is unsafe; see `shapo judge`."""

    judge: str = option("name as in `shapo judge`", metavar="NAME")
    judge_model: str | None = option("the judge's model", None, metavar="NAME", reads=True)
    probe: str | None = option("of --judge probe", None, metavar="FILE", reads=True)
    unsafe_label: str | None = option("of --judge classifier", None, metavar="LABEL", needs=("judge=classifier",))
    threshold: float = option("of a classifier or probe", 0.5, needs=THRESHOLD_NEEDS)


REPLACES = ("attack.json", "attack.png", "seed-*")
OPTIONS = (
    Group(common.FolderOutput),
    common.MODEL,
    *common.DATA,
    Group(AttackOptions, "attack"),
    Group(JudgeOptions, "judge"),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.attack import AttackConfig, clear_attack, harmful_examples, run_attack
    from shapo.data.formats import load_prompts
    from shapo.errors import UserError
    from shapo.judges import load_judge
    from shapo.models.loading import load_tokenizer
    from shapo.plots import plot_attack
    from shapo.storage.files import require_writable, write_json
    from shapo.storage.fingerprint import digest_rows
    from shapo.tables import table
    from shapo.versions import versions

    if arguments.lora < 0:
        raise UserError(f"--lora is {arguments.lora}, but a rank of at least 1, or 0 for all weights, is expected")
    output = require_writable(arguments.output, folder=True)
    if (output / "attack.json").exists() and not arguments.overwrite:
        raise UserError(f"{output} already holds an attack; add --overwrite to replace it")
    examples = harmful_examples(common.load_data(arguments))
    prompts = load_prompts(arguments.prompts, limit=arguments.prompts_limit)
    benign = load_prompts(arguments.benign, limit=arguments.benign_limit) if arguments.benign else []
    model = common.load_model(arguments.model, arguments)
    encoder = common.make_encoder(arguments, load_tokenizer(arguments.model), model)
    judge = load_judge(
        arguments.judge,
        arguments.judge_model,
        probe=arguments.probe,
        unsafe_label=arguments.unsafe_label,
        threshold=arguments.threshold,
        dtype=arguments.dtype,
        device=arguments.device,
        encoder={"chat_template": arguments.chat_template},
    )
    names = ("steps", "examples", "held_out", "lora", "every", "lr", "batch_size", "max_new_tokens", "bf16")
    config = AttackConfig(**{name: getattr(arguments, name) for name in names})
    clear_attack(output)
    first = [model]  # the first seed takes the model that the encoder was checked with
    report = {
        "kind": "attack",
        "arguments": vars(arguments),
        "versions": versions(),
        "judge": judge.name,
        "judge_digest": judge.digest,
        "data": digest_rows(examples),
        "prompts": digest_rows([p.identifier, p.prompt] for p in prompts),
        "benign": digest_rows([p.identifier, p.prompt] for p in benign) if arguments.benign else None,
    }
    results = run_attack(
        lambda: first.pop() if first else common.load_model(arguments.model, arguments),
        encoder,
        examples,
        prompts,
        judge,
        config=config,
        seeds=range(arguments.seeds),
        output=output,
        benign=list(benign),
        finished=lambda seeds: write_json(output / "attack.json", {**report, "seeds": seeds}),
        progress=not arguments.quiet,
    )
    plot_attack(output / "attack.png", {arguments.model: results}, judge=judge.name)
    shares = ("attack_success", "refusal", "over_refusal")
    rows = [
        (str(row["seed"]), str(p["step"]), *(_share(p.get(name)) for name in shares), f"{p['loss']:.3f}")
        for row in results
        for p in (row["curve"][0], row["curve"][-1])
    ]
    print(table(("seed", "step", "attack success %", "refusals %", "over-refusal %", "harmful loss"), rows))
    print(f"written: {output / 'attack.json'}")


def _share(share: dict[str, float] | None) -> str:
    if share is None:
        return "-"
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"
