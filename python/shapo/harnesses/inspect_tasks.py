"""Tasks for inspect_ai that serve a model folder: `inspect eval inspect_tasks.py@xstest -T folder=runs/shapo/model`.

`pip install shapo-kernels[harness]`. `prompts` needs nothing further: it answers a file of prompts and scores them by
one of our judges. `strong_reject`, `xstest` and `coconot` are those of the package inspect-evals, whose data come
from the hub and whose graders are models (see there). Answers are greedy: the model's stored sampling is not used.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from inspect_ai import Task, task, task_with
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from shapo.data.formats import load_prompts
from shapo.data.pairs import parse_transcript
from shapo.errors import UserError
from shapo.judges import load_judge


def served(folder: str, max_tokens: int = 512) -> Model:
    """The model and the tokenizer of a folder, in this process, greedy."""
    config, folder = GenerateConfig(max_tokens=max_tokens), _given(folder)
    return get_model("hf/local", config=config, model_path=folder, tokenizer_path=folder, do_sample=False)


@task
def prompts(
    folder: str, data: str, judge: str = "refusal-substring", judge_model: str | None = None, max_tokens: int = 128
) -> Task:
    """Answers the prompts of a file; the score is the share of unsafe answers, and of unreadable verdicts.

    Args:
        folder: The model's.
        data: As for `shapo evaluate --prompts`.
        judge, judge_model: As for `shapo judge`.
        max_tokens: Of an answer.
    """
    samples = [
        Sample(id=prompt.identifier, input=_turns(prompt.prompt), metadata={"prompt": prompt.prompt})
        for prompt in load_prompts(_given(data))
    ]
    return Task(
        dataset=samples, solver=generate(), scorer=by_judge(judge, judge_model), model=served(folder, max_tokens)
    )


_MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def _turns(prompt: str) -> list[ChatMessage]:
    return [_MESSAGES[turn["role"]](content=turn["content"]) for turn in parse_transcript(prompt)]


def _given(path: str) -> str:
    """`path` as seen from where inspect was started; it works in the folder of the task file."""
    found = Path(os.environ.get("PWD", ""), path)
    return str(found) if found.exists() else path


@scorer(metrics={"unsafe": [mean(), stderr()], "unreadable": [mean()]})
def by_judge(judge: str, judge_model: str | None = None) -> Scorer:
    """1 for an unsafe answer and 1 for an unreadable verdict, each under its name."""
    if (start := os.environ.get("PWD", "")) not in sys.path:
        sys.path.append(start)  # where a judge `module:function` may lie
    asked = load_judge(judge, judge_model and _given(judge_model))

    async def score(state: TaskState, target: Target) -> Score:
        verdict = asked([state.metadata["prompt"]], [state.output.completion])[0]
        values = {"unsafe": float(verdict.label == "unsafe"), "unreadable": float(verdict.label == "unreadable")}
        return Score(value=values)

    return score


@task
def strong_reject(folder: str, max_tokens: int = 512) -> Task:
    """inspect-evals' StrongREJECT on the folder's model."""
    return _published("strong_reject", folder, max_tokens)


@task
def xstest(folder: str, max_tokens: int = 512) -> Task:
    """inspect-evals' XSTest on the folder's model: over-refusal."""
    return _published("xstest", folder, max_tokens)


@task
def coconot(folder: str, max_tokens: int = 512) -> Task:
    """inspect-evals' CoCoNot on the folder's model: what should not be complied with."""
    return _published("coconot", folder, max_tokens)


def _published(name: str, folder: str, max_tokens: int) -> Task:
    try:
        module: Any = importlib.import_module(f"inspect_evals.{name}")
    except ImportError as error:
        raise UserError(f"{name} is a task of the package inspect-evals; `pip install inspect-evals`") from error
    return task_with(getattr(module, name)(), model=served(folder, max_tokens))
