"""Measures a model on preference pairs, writes its answers for a judge, counts judges' verdicts, or runs lm-eval's
tasks; one or several of these at once.

Pairs (--data): preference accuracy with a 95 % Wilson interval, DPO loss and margin, by category, against --reference
(without one, by mean log-probability per token).

Answers (--prompts): one answer a prompt as JSONL, in the order of the prompts. Temperature 0 is the argmax whatever
the model's generation_config stores; a sampled answer has a random state of its own, made of --seed and the prompt's
id. A stopped run goes on from --answers.part. The verdicts are `shapo judge`'s.

Verdicts (--verdicts FILE, once a benchmark): attack success of each benchmark and category, bounded from both sides
by the verdicts that could not be read, with a 95 % interval. --benign: over-refusal, from verdicts on benign prompts'
answers. --second-judge: Cohen's kappa with another judge's verdicts on the same answers. --against: the paired
difference to another model's verdicts. --comparisons: a judge's JSONL with `first` and `second`, the winner ("a",
"b", "tie") with A's answer first and with B's first.

What alignment costs elsewhere (--lm-eval truthfulqa_mc2,...): tasks of the optional package lm-eval on the model.

Writes --output, a JSON file, and --answers.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from shapo.commands import common
from shapo.errors import UserError
from shapo.options import Group, option, positive_int, seed_number
from shapo.ranks import Ranks

SUMMARY = "preference accuracy, answers for a judge, attack success, lm-eval's tasks"


@dataclass(frozen=True)
class PairOptions:
    """How pairs are compared."""

    reference: str | None = option(
        "the model that training started from", None, metavar="NAME", reads=True, needs=("data",)
    )
    beta: float = option("inverse temperature of the DPO loss", 0.1, needs=("data",))
    batch_size: int = option(
        "pairs or prompts through the model at once",
        16,
        parse=positive_int,
        metavar="N",
        needs=("data", "lm_eval", "prompts+engine=hf"),
    )


@dataclass(frozen=True)
class AnswerOptions:
    """What is answered, and how."""

    prompts: str | None = option(
        "Do-Not-Answer, HarmBench, SALAD-Bench or a file with a column prompt", None, metavar="SOURCE", reads=True
    )
    prompts_format: str = option("auto, do-not-answer, harmbench, salad-bench or prompt", "auto")
    prompts_limit: int | None = option("answer only the first N", None, parse=positive_int, metavar="N", absent="all")
    answers: str | None = option("JSONL file to write the answers to", None, metavar="FILE", writes=True)
    max_new_tokens: int = option("longest answer", 128, parse=positive_int, metavar="TOKENS")
    temperature: float = option("0 is greedy", 0.0)
    seed: int = option(
        "of sampling; each prompt's state is made of it and the prompt's id",
        0,
        parse=seed_number,
        needs=("temperature",),
    )
    engine: str = option("transformers, or vLLM (needs a GPU)", "hf", choices=("hf", "vllm"))


@dataclass(frozen=True)
class VerdictOptions:
    """Files of judges."""

    verdicts: list[str] = option(
        "verdicts on a benchmark of harmful prompts", metavar="FILE", repeated=True, reads=True
    )
    benign: str | None = option("verdicts on benign prompts: over-refusal", None, metavar="FILE", reads=True)
    second_judge: str | None = option(
        "another judge's verdicts on the first file's answers", None, metavar="FILE", reads=True, needs=("verdicts",)
    )
    against: str | None = option(
        "another model's verdicts on the first file's prompts", None, metavar="FILE", reads=True, needs=("verdicts",)
    )
    comparisons: str | None = option("a judge's JSONL with columns first and second", None, metavar="FILE", reads=True)


@dataclass(frozen=True)
class HarnessOptions:
    """Tasks of lm-eval."""

    lm_eval: str | None = option("names, separated by commas: truthfulqa_mc2,hellaswag ...", None, metavar="TASKS")
    lm_eval_path: str | None = option("task files of your own", None, metavar="FOLDER", reads=True, needs=("lm_eval",))
    lm_eval_limit: int | None = option(
        "only the first N cases of each task", None, parse=positive_int, metavar="N", absent="all", needs=("lm_eval",)
    )


_ON_MODEL = ("data", "prompts", "lm_eval")
OPTIONS = (
    Group(common.FileOutput),
    Group(common.ModelOptions, "model", optional=True, needs=common.needing(common.ModelOptions, *_ON_MODEL)),
    Group(common.SourceOption, "data", optional=True),
    Group(common.FormatOptions, "data", needs=common.needing(common.FormatOptions, "data")),
    Group(
        common.TokenOptions,
        "tokens",
        needs={**common.needing(common.TokenOptions, "data", "prompts"), "chat_template": _ON_MODEL},
    ),
    Group(PairOptions),
    Group(
        AnswerOptions,
        "answers",
        needs={**common.needing(AnswerOptions, "prompts"), "prompts": ("answers",)},
    ),
    Group(VerdictOptions, "verdicts"),
    Group(HarnessOptions, "lm-eval"),
    common.QUIET,
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.storage.files import require_writable, write_json

    _check(arguments)
    require_writable(arguments.output)
    if arguments.answers:
        require_writable(arguments.answers)
    result: dict[str, Any] = {"arguments": vars(arguments)}
    # The files first: a mistake in them is found before a model has worked for an hour.
    if arguments.verdicts or arguments.benign:
        result |= _verdicts(arguments)
    if arguments.comparisons:
        result |= _comparisons(arguments.comparisons)
    if arguments.data or arguments.prompts or arguments.lm_eval:
        result |= _with_model(arguments)
    if not Ranks.here().is_main:
        return
    write_json(arguments.output, result)
    print(f"written: {arguments.output}")


def _check(arguments: argparse.Namespace) -> None:
    on_model = arguments.data or arguments.prompts or arguments.lm_eval
    if not (on_model or arguments.verdicts or arguments.benign or arguments.comparisons):
        raise UserError("nothing to evaluate; give --data, --prompts, --verdicts, --benign, --comparisons or --lm-eval")
    if on_model and not arguments.model:
        raise UserError("--data, --prompts and --lm-eval need a model; name one with --model")
    if Ranks.here().count > 1 and (arguments.lm_eval or arguments.engine == "vllm"):
        raise UserError("--lm-eval and --engine vllm have processes of their own: start evaluate without the launcher")
    if arguments.engine == "vllm":
        from shapo.answers.vllm import require_vllm

        require_vllm()
    if arguments.lm_eval:
        from shapo.harnesses.lm_eval import require_lm_eval

        require_lm_eval()
    if arguments.temperature != 0 and not 1e-3 <= arguments.temperature < math.inf:
        raise UserError(
            f"the temperature is {arguments.temperature}, but 0 (greedy) or a number from 0.001 on is expected"
        )
    if not 0 < arguments.beta < math.inf:
        raise UserError(f"beta is {arguments.beta}, but a finite value above 0 is expected")


def _with_model(arguments: argparse.Namespace) -> dict[str, Any]:
    from shapo.data.formats import load_prompts
    from shapo.models.loading import load_tokenizer
    from shapo.versions import versions

    prompts = None
    if arguments.prompts:
        prompts = load_prompts(arguments.prompts, format=arguments.prompts_format, limit=arguments.prompts_limit)
        print(prompts.summary())
    pairs = common.load_data(arguments) if arguments.data else None
    model = common.load_model(arguments.model, arguments)
    tokenizer = load_tokenizer(arguments.model)
    encoder = common.make_encoder(arguments, tokenizer, model)
    result: dict[str, Any] = {"versions": versions()}
    if pairs is not None:
        result["preferences"] = _preferences(arguments, model, encoder, pairs)
    if prompts is not None:
        _write_answers(arguments, model, encoder, prompts)
        print(f"answers: {arguments.answers}")
    if arguments.lm_eval:
        from shapo.harnesses.lm_eval import run_tasks

        tasks = [name.strip() for name in arguments.lm_eval.split(",") if name.strip()]
        result["lm_eval"] = run_tasks(
            model,
            tokenizer,
            tasks,
            folder=arguments.lm_eval_path,
            limit=arguments.lm_eval_limit,
            batch_size=arguments.batch_size,
            chat_template=arguments.chat_template,
        )
        for name, values in result["lm_eval"].items():
            print(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values["metrics"].items()))
    return result


def _preferences(arguments: argparse.Namespace, model: Any, encoder: Any, pairs: Any) -> dict[str, Any]:
    from shapo.evaluation import preference_metrics
    from shapo.scoring.logps import TokenizedPairs, compute_logps

    data = TokenizedPairs(pairs, encoder)
    options: Any = {"batch_size": arguments.batch_size, "progress": not arguments.quiet, "ranks": Ranks.here()}
    policy = compute_logps(model, data, description="model", **options)
    reference = None
    if arguments.reference:
        start = common.load_model(arguments.reference, arguments)
        reference = compute_logps(start, data, description="reference", **options)
    metrics = preference_metrics(policy, reference, data.pairs, beta=arguments.beta)
    accuracy = metrics["accuracy"]
    print(
        f"preference accuracy {_percent(accuracy)}, loss {metrics['loss']:.4f}, "
        f"margin {metrics['margin']:+.3f}, {accuracy['n']} pairs"
    )
    return metrics


def _write_answers(arguments: argparse.Namespace, model: Any, encoder: Any, prompts: Any) -> None:
    from shapo.answers.decoding import Engine, TransformersEngine
    from shapo.answers.turns import ending
    from shapo.answers.writing import prompt_requests, write_answers
    from shapo.storage.fingerprint import digest_model

    end = ending(encoder.tokenizer, model, chat_template=arguments.chat_template)
    decoding = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    key = {"model": digest_model(model), "template": encoder.settings, "engine": arguments.engine, **decoding}
    if arguments.temperature > 0:
        key["seed"] = arguments.seed
    requests = prompt_requests(encoder, prompts, max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)
    engine: Engine
    if arguments.engine == "vllm":
        from shapo.answers.vllm import VLLMEngine

        model.to("cpu")  # vLLM loads the folder itself and wants the GPU's memory
        engine = VLLMEngine(arguments.model, encoder.tokenizer, end, dtype=arguments.dtype, **decoding)
    else:
        engine = TransformersEngine(model, encoder.tokenizer, end, batch_size=arguments.batch_size, **decoding)
    write_answers(
        engine, prompts, requests, arguments.answers, key=key, progress=not arguments.quiet, ranks=Ranks.here()
    )


def _verdicts(arguments: argparse.Namespace) -> dict[str, Any]:
    from shapo.safety import safety_summary

    summary = safety_summary(
        arguments.verdicts,
        benign=arguments.benign,
        second_judge=arguments.second_judge,
        against=arguments.against,
    )
    for name, share in summary["attack_success"].items():
        print(f"attack success, {name}, by {share['judge']}: {_bounds(share)}")
    refused = summary["over_refusal"]
    print(f"over-refusal: {refused if isinstance(refused, str) else _bounds(refused)}")
    if "agreement" in summary:
        a = summary["agreement"]
        if math.isnan(a["kappa"]):
            print(f"Cohen's kappa is not defined: of {a['n']} answers read by both, each judge says the same of all")
        else:
            print(f"Cohen's kappa {a['kappa']:.3f} (95 %: {a['low']:.2f} to {a['high']:.2f}), {a['n']} answers")
    if "difference" in summary:
        d = summary["difference"]
        print(
            f"difference to {arguments.against}: {100 * d['difference']:+.1f} points (95 %: {100 * d['low']:+.1f} to "
            f"{100 * d['high']:+.1f}; McNemar p = {d['p_value']:.3g}; {d['n']} prompts, {d['left_out']} left out)"
        )
    return summary


def _comparisons(path: str) -> dict[str, Any]:
    from shapo.judges.files import read_rows
    from shapo.statistics import win_rate

    wins = win_rate([(row["first"], row["second"]) for row in read_rows(path, ("first", "second"))])
    print(
        f"win rate of A {_percent(wins)}, {wins['n']} comparisons; both orders agree in {wins['orders_agree']}, "
        f"{wins['unparsed']} unreadable ones are left out"
    )
    return {"win_rate": wins}


def _bounds(share: dict[str, Any]) -> str:
    low, high = (f"{100 * share[name]:.1f}" for name in ("low", "high"))
    return (
        f"{low if low == high else f'{low} to {high}'} % ({share['unreadable']} of {share['n']} unreadable; "
        f"95 %: {100 * share['interval_low']:.1f} to {100 * share['interval_high']:.1f})"
    )


def _percent(share: dict[str, float]) -> str:
    return f"{100 * share['value']:.1f} % (95 %: {100 * share['low']:.1f} to {100 * share['high']:.1f})"
