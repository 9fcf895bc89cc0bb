"""The answers file: one JSON line a prompt (`id, category, prompt, answer, finished`), in the prompts' order, for a
judge."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from shapo.answers.decoding import Completion, Engine, Request
from shapo.data.pairs import EvaluationPrompt
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.storage.rows import ResumableRows


def prompt_requests(
    encoder: PairEncoder, prompts: Sequence[EvaluationPrompt], *, max_new_tokens: int, seed: int = 0
) -> list[Request]:
    """The prompts as the encoder writes them, each with a seed made of `seed` and its id."""
    return [
        Request(encoder.encode_prompt(p.prompt, max_new_tokens=max_new_tokens), prompt_seed(seed, p.identifier))
        for p in prompts
    ]


def prompt_seed(seed: int, identifier: str) -> int:
    """A seed that neither the other prompts nor their number change."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{identifier}".encode(), digest_size=7).digest(), "big")


def write_answers(
    engine: Engine,
    prompts: Sequence[EvaluationPrompt],
    requests: Sequence[Request],
    path: str | os.PathLike[str],
    *,
    key: dict[str, Any],
    progress: bool = True,
) -> None:
    """Answers every prompt and writes the file; what a stopped run has left in `<path>.part` is not asked again.

    Args:
        key: What the answers depend on beside the prompts: model, template, decoding. See `ResumableRows`.

    Raises:
        UserError: Two prompts share an id, or the file cannot be written.
    """
    identifiers = [prompt.identifier for prompt in prompts]
    if len(set(identifiers)) != len(identifiers):
        raise UserError("two prompts have the same id, so their answers could not be told apart; give each its own")
    with ResumableRows(path, key) as rows:
        left = [n for n, p in enumerate(prompts) if rows.rows.get(p.identifier, {}).get("prompt") != p.prompt]
        with tqdm(
            total=len(prompts), initial=len(prompts) - len(left), desc="answers", unit="prompt", disable=not progress
        ) as bar:

            def keep(indices: list[int], completions: list[Completion]) -> None:
                rows.add(_row(prompts[left[n]], completion) for n, completion in zip(indices, completions, strict=True))
                bar.update(len(indices))

            engine.complete([requests[n] for n in left], keep)
        rows.finish(identifiers)


def _row(prompt: EvaluationPrompt, completion: Completion) -> dict[str, Any]:
    return {
        "id": prompt.identifier,
        "category": prompt.category,
        "prompt": prompt.prompt,
        "answer": completion.text,
        "finished": completion.finished,
    }
