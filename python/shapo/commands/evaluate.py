"""Measures a model on preference pairs, writes answers for a judge, or counts a judge's verdicts; one or several of
these at once.

Pairs (--data): preference accuracy with a 95 % Wilson interval, DPO loss and margin, by category, against --reference
(without one, by mean log-probability per token).

Answers (--prompts): one answer a prompt as JSONL (id, category, prompt, answer) in the order of the prompts, each from
a random state of its own.  No verdict is made here: a judge reads the file.

Verdicts (--verdicts): a judge's JSONL with a column `verdict` of "safe" or "unsafe"; anything else is unparsed, and the
attack success rate is bounded from below and above by what those may be.  --comparisons: a judge's JSONL with `first`
and `second`, the winner ("a", "b", "tie") with A's answer first and with B's first.

Writes --output, a JSON file, and --answers.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shapo.commands import common
from shapo.errors import UserError
from shapo.options import Group, option, positive_int

SUMMARY = "preference accuracy, answers for a judge, attack success from its verdicts"


@dataclass(frozen=True)
class PairOptions:
    """How pairs are compared."""

    reference: str | None = option("the model that training started from", None, metavar="NAME")
    beta: float = option("inverse temperature of the DPO loss", 0.1)
    batch_size: int = option("pairs through the model at once", 16, parse=positive_int, metavar="N")


@dataclass(frozen=True)
class AnswerOptions:
    """What is answered, and how."""

    prompts: str | None = option(
        "Do-Not-Answer, HarmBench, SALAD-Bench or a file with a column prompt", None, metavar="SOURCE"
    )
    prompts_format: str = option("auto, do-not-answer, harmbench, salad-bench or prompt", "auto")
    prompts_limit: int | None = option("answer the first N alone", None, parse=positive_int, metavar="N", absent="all")
    answers: str | None = option("JSONL file to write the answers to", None, metavar="FILE")
    max_new_tokens: int = option("of an answer", 128, parse=positive_int, metavar="TOKENS")
    temperature: float = option("0 is greedy", 0.0)
    seed: int = option("of sampling; each prompt's state is made of it and the prompt's id", 0)


@dataclass(frozen=True)
class VerdictOptions:
    """Files of a judge."""

    verdicts: str | None = option("a judge's JSONL with a column verdict", None, metavar="FILE")
    comparisons: str | None = option("a judge's JSONL with columns first and second", None, metavar="FILE")


OPTIONS = (
    Group(common.FileOutput),
    Group(common.ModelOptions, "model", optional=True),
    Group(common.SourceOption, "data", optional=True),
    Group(common.FormatOptions, "data"),
    common.TOKENS,
    Group(PairOptions),
    Group(AnswerOptions, "answers"),
    Group(VerdictOptions, "verdicts"),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.storage.files import require_writable, write_json

    _check(arguments)
    require_writable(arguments.output)
    if arguments.answers:
        require_writable(arguments.answers)
    verdicts = _column_rows(arguments.verdicts, ("verdict",)) if arguments.verdicts else None
    comparisons = _column_rows(arguments.comparisons, ("first", "second")) if arguments.comparisons else None
    result: dict[str, Any] = {"arguments": vars(arguments)}
    if arguments.data or arguments.prompts:
        result |= _with_model(arguments)
    if verdicts is not None or comparisons is not None:
        result |= _judged(verdicts, comparisons)
    write_json(arguments.output, result)
    print(f"written: {arguments.output}")


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.data or arguments.prompts or arguments.verdicts or arguments.comparisons):
        raise UserError("nothing to evaluate; give --data, --prompts, --verdicts or --comparisons")
    if (arguments.data or arguments.prompts) and not arguments.model:
        raise UserError("--data and --prompts need a model; name one with --model")
    if arguments.model and not (arguments.data or arguments.prompts):
        raise UserError("--model is asked for --data or --prompts; give one of them, or leave the model out")
    if arguments.reference and not arguments.data:
        raise UserError("--reference is what the model is compared with on --data; give that too")
    if arguments.answers and Path(arguments.answers).absolute() == Path(arguments.output).absolute():
        raise UserError("--answers and --output name the same file; the answers need one of their own")
    if bool(arguments.prompts) != bool(arguments.answers):
        raise UserError("--prompts and --answers go together: what to answer, and where to write it")
    if not 0 <= arguments.temperature < math.inf:
        raise UserError(f"the temperature is {arguments.temperature}, but a finite value of at least 0 is expected")
    if not arguments.beta > 0:
        raise UserError(f"beta is {arguments.beta}, but a value above 0 is expected")


def _with_model(arguments: argparse.Namespace) -> dict[str, Any]:
    from shapo.data.formats import load_prompts
    from shapo.evaluation import generate_answers, preference_metrics
    from shapo.models.loading import load_tokenizer
    from shapo.scoring.logps import TokenizedPairs, compute_logps
    from shapo.versions import versions

    prompts = None
    if arguments.prompts:
        prompts = load_prompts(arguments.prompts, format=arguments.prompts_format, limit=arguments.prompts_limit)
        print(prompts.summary())
    pairs = common.load_data(arguments) if arguments.data else None
    model = common.load_model(arguments.model, arguments)
    encoder = common.make_encoder(arguments, load_tokenizer(arguments.model), model)
    result: dict[str, Any] = {"versions": versions()}
    if pairs is not None:
        data = TokenizedPairs(pairs, encoder)
        options: Any = {"batch_size": arguments.batch_size, "progress": not arguments.quiet}
        policy = compute_logps(model, data, description="model", **options)
        reference = None
        if arguments.reference:
            judge = common.load_model(arguments.reference, arguments)
            reference = compute_logps(judge, data, description="reference", **options)
        metrics = preference_metrics(policy, reference, data.pairs, beta=arguments.beta)
        result["preferences"] = metrics
        accuracy = metrics["accuracy"]
        print(
            f"preference accuracy {_percent(accuracy)}, loss {metrics['loss']:.4f}, "
            f"margin {metrics['margin']:+.3f}, {accuracy['n']} pairs"
        )
    if prompts is not None:
        generate_answers(
            model,
            encoder,
            prompts,
            arguments.answers,
            seed=arguments.seed,
            temperature=arguments.temperature,
            max_new_tokens=arguments.max_new_tokens,
            progress=not arguments.quiet,
        )
        print(f"answers: {arguments.answers}")
    return result


def _judged(verdicts: list[tuple[Any, ...]] | None, comparisons: list[tuple[Any, ...]] | None) -> dict[str, Any]:
    from shapo.evaluation import attack_success, win_rate

    result: dict[str, Any] = {}
    if verdicts is not None:
        success = attack_success([row[0] for row in verdicts])
        result["attack_success"] = asdict(success)
        print(
            f"attack success {100 * success.low:.1f} to {100 * success.high:.1f} % "
            f"({success.unparsed} of {success.n} unparsed; "
            f"95 %: {100 * success.interval_low:.1f} to {100 * success.interval_high:.1f})"
        )
    if comparisons is not None:
        wins = win_rate([(row[0], row[1]) for row in comparisons])
        result["win_rate"] = wins
        print(f"win rate of A {_percent(wins)}, {wins['n']} comparisons")
    return result


def _percent(share: dict[str, float]) -> str:
    return f"{100 * share['value']:.1f} % (95 %: {100 * share['low']:.1f} to {100 * share['high']:.1f})"


def _column_rows(path: str, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    try:
        # Not splitlines: a JSON string may hold U+2028 and its like, which end no line of a JSONL file.
        with open(path, encoding="utf-8") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(tuple(row[column] for column in columns))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: expected a JSON object with {' and '.join(columns)}") from error
    if not rows:
        raise UserError(f"{path} is empty")
    return rows
