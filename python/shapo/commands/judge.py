"""Asks a judge about answers: a guard model by its published prompt, a classifier, a probe, refusal by substring, a
judge of judgezoo, or a function of your own.

Reads --answers, JSON lines with `prompt` and `answer` (`shapo evaluate --prompts` writes such a file). Writes
--output, a line an answer with `verdict` (safe, unsafe, or unreadable where the judge said neither), `score`,
`refusal` and `categories`; no prompt and no answer stands in it. A run that was stopped goes on from --output.part.

docs/evaluation.md says what each judge's verdict means, where its format comes from, and whether it has been run for
real.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

from shapo.commands import common
from shapo.options import Group, option, positive_int, read

THRESHOLD_NEEDS = ("judge=classifier", "judge=probe", "judge=judgezoo:*")
_WORDLESS = ("classifier", "probe", "refusal-substring")
SUMMARY = "a judge's verdicts on answers: safe, unsafe or unreadable"


@dataclass(frozen=True)
class JudgeOptions:
    """Which judge, and what it reads and writes."""

    answers: str = option("JSONL with columns prompt and answer", metavar="FILE", reads=True)
    judge: str = option(
        "md-judge-v0.2, nemotron-safety-guard, llama-guard-3, llama-guard-4, wildguard, harmbench, qwen3guard, "
        "granite-guardian, shieldgemma, classifier, probe, refusal-substring, judgezoo:NAME or module:function",
        metavar="NAME",
    )
    output: str = option("JSONL of the verdicts", metavar="FILE", writes=True)
    probe: str | None = option("of --judge probe: the file that `shapo probe` wrote", None, metavar="FILE", reads=True)
    unsafe_label: str | None = option(
        "of --judge classifier: the label that means unsafe", None, metavar="LABEL", needs=("judge=classifier",)
    )
    threshold: float = option(
        "harm from which on a classifier's or probe's verdict is unsafe", 0.5, needs=THRESHOLD_NEEDS
    )
    batch_size: int = option(
        "answers through the model at once", 8, parse=positive_int, metavar="N", needs=("model", "judge=*:*")
    )
    raw: bool = option("keep what the judge wrote, which may quote the answers", False)
    overwrite: bool = option("replace --output, and what another run left of it", False)


OPTIONS = (
    Group(JudgeOptions),
    Group(
        common.ModelOptions,
        "model",
        optional=True,
        helps={"model": "the judge's model: a folder or a hub name"},
        needs={"dtype": ("model",), "device": ("model",)},
    ),
    Group(common.TokenOptions, "tokens of a probe's input", needs=common.needing(common.TokenOptions, "judge=probe")),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.errors import UserError
    from shapo.judges import FAMILIES, load_judge
    from shapo.judges.files import judge_answers, read_rows
    from shapo.notes import note
    from shapo.storage.files import require_writable

    if arguments.raw and (arguments.judge in _WORDLESS or arguments.judge.startswith("judgezoo:")):
        raise UserError(f"--raw has no effect with the judge {arguments.judge}, which writes no text")
    output = require_writable(arguments.output)
    if output.exists() and not arguments.overwrite:
        raise UserError(f"{output} exists; add --overwrite to replace it, or name another file")
    rows = read_rows(arguments.answers, ("prompt", "answer"))
    judge = load_judge(
        arguments.judge,
        arguments.model,
        probe=arguments.probe,
        unsafe_label=arguments.unsafe_label,
        threshold=arguments.threshold,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        encoder={
            "max_length": arguments.max_length,
            "max_prompt_length": read(common.TokenOptions, arguments).prompt_length(),
            "chat_template": arguments.chat_template,
        },
    )
    verdicts = judge_answers(
        judge,
        rows,
        output,
        key={"raw": arguments.raw},
        batch_size=4 * arguments.batch_size,
        progress=not arguments.quiet,
        raw=arguments.raw,
        restart=arguments.overwrite,
    )
    counts = Counter(row["verdict"] for row in verdicts)
    print(f"{judge.name}: " + ", ".join(f"{counts[label]} {label}" for label in ("unsafe", "safe", "unreadable")))
    if arguments.judge in FAMILIES and counts["unreadable"] == len(rows):
        note(f"none of the outputs is a verdict of {judge.name}: is {arguments.model} that guard? --raw keeps them")
    refusals = [row["refusal"] for row in verdicts if row["refusal"] is not None]
    if refusals:
        print(f"refusals: {sum(refusals)} of {len(refusals)}")
    print(f"verdicts: {output}")
