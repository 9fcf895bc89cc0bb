"""The answers file: one JSON line a prompt (`id, category, prompt, answer, finished`), in the prompts' order, for a
judge."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

from shapo.answers.decoding import Completion, Engine, Request
from shapo.checked import checked
from shapo.data.pairs import EvaluationPrompt
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.ranks import ALONE, Ranks
from shapo.storage.rows import ResumableRows

_ROUND = 64  # prompts of a rank between two gatherings: what a stopped run loses at most


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


@checked
def write_answers(
    engine: Engine,
    prompts: Sequence[EvaluationPrompt],
    requests: Sequence[Request],
    path: str | os.PathLike[str],
    *,
    key: dict[str, Any],
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> None:
    """Answers every prompt and writes the file; what a stopped run has left in `<path>.part` is not asked again.

    Args:
        key: What the answers depend on beside the prompts: model, template, decoding. See `ResumableRows`.
        ranks: Processes that answer the prompts between them, in rounds; rank 0 writes.

    Raises:
        UserError: Two prompts share an id, or the file cannot be written.
    """
    identifiers = [prompt.identifier for prompt in prompts]
    if len(set(identifiers)) != len(identifiers):
        raise UserError("two prompts have the same id, so their answers could not be told apart; give each its own")
    with ResumableRows(path, key) if ranks.is_main else nullcontext() as rows:

        def unanswered() -> list[int]:
            assert rows is not None
            return [n for n, p in enumerate(prompts) if rows.rows.get(p.identifier, {}).get("prompt") != p.prompt]

        left = ranks.on_main(unanswered)
        with tqdm(
            total=len(prompts), initial=len(prompts) - len(left), desc="answers", unit="prompt", disable=not progress
        ) as bar:

            def add(found: list[dict[str, Any]]) -> None:
                if rows is not None:
                    rows.add(found)
                bar.update(len(found))

            size = _ROUND * ranks.count if ranks.count > 1 else max(1, len(left))
            for start in range(0, len(left), size):
                _answer(engine, prompts, requests, left[start : start + size], ranks, add)
        if rows is not None:
            rows.finish(identifiers)


def _answer(
    engine: Engine,
    prompts: Sequence[EvaluationPrompt],
    requests: Sequence[Request],
    asked: Sequence[int],
    ranks: Ranks,
    add: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Answers the prompts of `asked` and adds their rows: one process each batch's, ranks all of them at the end."""
    own = asked[ranks.rank :: ranks.count]
    made: list[dict[str, Any]] = []

    def keep(indices: list[int], completions: list[Completion]) -> None:
        found = [_row(prompts[own[n]], completion) for n, completion in zip(indices, completions, strict=True)]
        add(found) if ranks.count == 1 else made.extend(found)

    engine.complete([requests[n] for n in own], keep)
    if ranks.count > 1:
        for found in ranks.gathered(made):
            add(found)


def _row(prompt: EvaluationPrompt, completion: Completion) -> dict[str, Any]:
    return {
        "id": prompt.identifier,
        "category": prompt.category,
        "prompt": prompt.prompt,
        "answer": completion.text,
        "finished": completion.finished,
    }
