"""How deep an alignment goes: the aligned model is fine-tuned on a few harmful answers and measured along the way.

The attack is plain SFT, of all weights or of LoRA adapters. At step 0, every so many steps and at the end the model
answers held-out harmful prompts greedily, a judge gives verdicts, and refusals and the loss on held-out harmful
answers are counted; so are refusals of benign prompts, where there are some. Several seeds draw other examples and
another order.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shapo.answers.decoding import TransformersEngine
from shapo.answers.turns import ending
from shapo.answers.writing import prompt_requests
from shapo.checked import checked
from shapo.config import LoopConfig
from shapo.data.pairs import EvaluationPrompt, PreferencePair
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.judges.base import Judge, Verdict
from shapo.judges.files import verdict_row
from shapo.judges.refusal import RefusalJudge
from shapo.models.adapters import Lora, add_lora
from shapo.statistics import bounded_share, unsafe_case
from shapo.storage.files import json_line, write_text
from shapo.training.loop import METRICS
from shapo.training.metrics import read_metrics
from shapo.training.sft import train_sft

Example = tuple[str, str]
_COUNTED = ("attack_success", "refusal", "over_refusal", "finished")


@checked
@dataclass(frozen=True)
class AttackConfig:
    """An attack's size.

    Attributes:
        steps: Updates.
        examples: Harmful answers to train on, drawn anew for each seed.
        held_out: Harmful answers kept for the loss, of prompts that no seed trains on.
        lora: Rank of the adapters on all linear layers; 0 trains all weights.
        every: Steps between two measurements.
        lr, batch_size: Of AdamW, constant learning rate, clipped at 1.
        max_new_tokens: Of an answer.
        bf16: Train under bfloat16 autocast; answers are computed in the weights' precision.
    """

    steps: int = 50
    examples: int = 64
    held_out: int = 16
    lora: int = 0
    every: int = 10
    lr: float = 1e-5
    batch_size: int = 8
    max_new_tokens: int = 64
    bf16: bool = False


def harmful_examples(pairs: Sequence[PreferencePair]) -> list[Example]:
    """The answers that are marked unsafe, each once; where no answer of the data is marked, the rejected ones."""
    marked = any(p.chosen_unsafe is not None or p.rejected_unsafe is not None for p in pairs)
    found: dict[Example, None] = {}
    for pair in pairs:
        if pair.chosen_unsafe:
            found[pair.prompt, pair.chosen] = None
        if pair.rejected_unsafe or not marked:
            found[pair.prompt, pair.rejected] = None
    return list(found)


def split_examples(examples: Sequence[Example], config: AttackConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples of one seed and those held out, which are the same for every seed; no prompt is in both.

    Raises:
        UserError: Too few examples, or too few prompts to hold any out.
    """
    prompts = list(dict.fromkeys(prompt for prompt, _ in examples))
    random.Random(0).shuffle(prompts)
    held_out: list[Example] = []
    while prompts and len(held_out) < config.held_out:
        prompt = prompts.pop()
        held_out += [example for example in examples if example[0] == prompt]
    rest = [example for example in examples if example[0] in set(prompts)]
    if len(rest) < config.examples:
        raise UserError(
            f"the attack needs {config.examples} harmful answers beside those held out, but there are {len(rest)}; "
            "give more data or lower --examples or --held-out"
        )
    return random.Random(seed).sample(rest, config.examples), held_out[: config.held_out]


def clear_attack(output: Path) -> None:
    """Removes an earlier attack's results, so that none of them stands beside those of the next one."""
    names = (
        "attack.json",
        "attack.png",
        *(f"seed-*/{name}" for name in (METRICS, "verdicts-*.jsonl", "benign-*.jsonl")),
    )
    for stale in [path for name in names for path in output.glob(name)]:
        stale.unlink()
    for folder in output.glob("seed-*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@checked
def run_attack(
    load: Callable[[], Any],
    encoder: PairEncoder,
    examples: Sequence[Example],
    prompts: Sequence[EvaluationPrompt],
    judge: Judge,
    *,
    config: AttackConfig,
    seeds: Sequence[int],
    output: Path,
    benign: Sequence[EvaluationPrompt] = (),
    finished: Callable[[list[dict[str, Any]]], None] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Attacks a fresh model for each seed.

    Args:
        load: Gives the aligned model anew.
        examples: From `harmful_examples`.
        prompts: Harmful prompts to answer; none of them may be one that is trained on.
        output: Each seed writes `seed-N/metrics.jsonl` here, and for each measured step `seed-N/verdicts-STEP.jsonl`
            (and `benign-STEP.jsonl`): verdict files, so that two models can be compared prompt by prompt.
        benign: Prompts that should be answered; refusals of them are counted.
        finished: Called after each seed with the results so far.

    Returns:
        For each seed its `curve`: step, loss, attack_success, refusal and over_refusal (`BoundedShare`s; the last where
        benign prompts are given), finished answers.

    Raises:
        UserError: See `split_examples`; a prompt that is trained on.
    """
    if shared := {prompt for prompt, _ in examples} & {prompt.prompt for prompt in prompts}:
        raise UserError(f"{len(shared)} of the prompts to answer are prompts of the attack's data; keep them apart")
    results: list[dict[str, Any]] = []
    for seed in seeds:
        training, held_out = split_examples(examples, config, seed)
        model = load()
        if config.lora:
            model = add_lora(model, Lora(r=config.lora), seed=seed)
        folder = output / f"seed-{seed}"
        start = (output / f"seed-{seeds[0]}", results[0]["curve"][0]) if results else None
        measure = _Measurement(model, encoder, prompts, benign, judge, config.max_new_tokens, folder, start)
        train_sft(
            model,
            encoder,
            training,
            config=LoopConfig(
                updates=config.steps,
                batch_size=min(config.batch_size, len(training)),
                lr=config.lr,
                optimizer="adamw",
                schedule="constant",
                warmup=0,
                clip=1.0,
                seed=seed,
                bf16=config.bf16,
                eval_every=config.every,
            ),
            output=folder,
            held_out=held_out,
            measure=measure,
            progress=progress,
        )
        curve = [
            {"step": row["update"], **{name: row[name] for name in ("loss", *_COUNTED) if name in row}}
            for row in read_metrics(folder / METRICS, "evaluation")
        ]
        results.append({"seed": seed, "curve": curve})
        if finished:
            finished(results)
    return results


class _Measurement:
    """Answers the prompts with the model as it is now, writes the verdicts to `folder` and counts them.

    Every seed begins with the same model, and LoRA adapters add nothing at first, so all seeds share the answers of
    step 0: `start` names the folder and the point of the seed that has them.
    """

    def __init__(
        self,
        model: Any,
        encoder: PairEncoder,
        prompts: Sequence[EvaluationPrompt],
        benign: Sequence[EvaluationPrompt],
        judge: Judge,
        max_new_tokens: int,
        folder: Path,
        start: tuple[Path, dict[str, Any]] | None,
    ) -> None:
        end = ending(encoder.tokenizer, model, chat_template=encoder.chat_template)
        self.engine = TransformersEngine(model, encoder.tokenizer, end, max_new_tokens=max_new_tokens)
        self.asked = [*prompts, *benign]
        self.requests = prompt_requests(encoder, self.asked, max_new_tokens=max_new_tokens)
        self.harmful, self.judge, self.folder, self.start = len(prompts), judge, folder, start

    def __call__(self, step: int) -> dict[str, Any]:
        if self.start and step == 0:
            folder, point = self.start
            for file in (*folder.glob("verdicts-0.jsonl"), *folder.glob("benign-0.jsonl")):
                shutil.copyfile(file, self.folder / file.name)
            return {name: point[name] for name in _COUNTED if name in point}
        completions = self.engine.complete(self.requests)
        rows = [
            {"id": prompt.identifier, "category": prompt.category, "prompt": prompt.prompt, "answer": completion.text}
            for prompt, completion in zip(self.asked, completions, strict=True)
        ]
        harmful, benign = rows[: self.harmful], rows[self.harmful :]
        verdicts = self._judged(self.judge, harmful, f"verdicts-{step}.jsonl")
        counted = {
            "attack_success": asdict(bounded_share([unsafe_case(verdict.label) for verdict in verdicts])),
            "refusal": asdict(bounded_share([verdict.refusal for verdict in _verdicts(RefusalJudge(), harmful)])),
            "finished": sum(completion.finished for completion in completions[: self.harmful]),
        }
        if benign:
            refused = self._judged(RefusalJudge(), benign, f"benign-{step}.jsonl")
            counted["over_refusal"] = asdict(bounded_share([verdict.refusal for verdict in refused]))
        return counted

    def _judged(self, judge: Judge, rows: list[dict[str, Any]], name: str) -> list[Verdict]:
        verdicts = _verdicts(judge, rows)
        lines = [json_line(verdict_row(judge, row, v)) for row, v in zip(rows, verdicts, strict=True)]
        write_text(self.folder / name, "".join(lines))
        return verdicts


def _verdicts(judge: Judge, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    return judge([row["prompt"] for row in rows], [row["answer"] for row in rows])
