"""A local generative guard: its family writes the input and reads the output, a greedy engine is between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from shapo.answers.decoding import Completion, Request, TransformersEngine
from shapo.answers.turns import Ending, ending
from shapo.data.pairs import parse_transcript
from shapo.data.tokens import tokenizer_digest
from shapo.judges.base import UNREADABLE, Family, Label, Messages, Verdict, disarm
from shapo.storage.fingerprint import digest_model, digest_rows


class GenerativeJudge:
    """Asks a guard about each (prompt, answer). An empty answer is unreadable without being asked about.

    Args:
        family: The guard's formats.
        model: A causal language model in evaluation; greedy decoding whatever its generation_config says.
        tokenizer: The guard's own, with its chat template where the family uses it.
        batch_size: Texts through the model at once.
        max_length: Longest input in tokens. A longer answer is not judged but unreadable: half of it is another answer.
    """

    def __init__(
        self, family: Family, model: Any, tokenizer: Any, *, batch_size: int = 8, max_length: int = 4096
    ) -> None:
        self.family, self.tokenizer, self.max_length, self.name = family, tokenizer, max_length, family.name
        end = Ending(ending(tokenizer, model).ids)
        self.engine = TransformersEngine(
            model,
            tokenizer,
            end,
            max_new_tokens=family.max_new_tokens,
            batch_size=batch_size,
            first_logits=family.words is not None,
        )
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self.marks = sorted({*family.marks, *map(str, tokenizer.all_special_tokens), *added})
        self.words = [_first_token(tokenizer, word) for word in family.words or ()]

    @cached_property
    def digest(self) -> str:
        model = digest_model(self.engine.model)
        return digest_rows([self.name, model, tokenizer_digest(self.tokenizer), self.max_length])

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        asked = [self._write(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        completions = iter(self.engine.complete([Request(ids) for texts in asked for ids in texts]))
        return [self._verdict([next(completions) for _ in texts]) for texts in asked]

    def _write(self, prompt: str, answer: str) -> list[list[int]]:
        if not answer.strip():
            return []
        messages: Messages = [
            {**message, "content": disarm(message["content"], self.marks)} for message in parse_transcript(prompt)
        ]
        texts = self.family.write(self.tokenizer, messages, disarm(answer, self.marks))
        ids = [
            list(self.tokenizer(text, add_special_tokens=self.family.special_tokens, verbose=False)["input_ids"])
            for text in texts
        ]
        return [] if max(map(len, ids)) > self.max_length else ids

    def _verdict(self, completions: list[Completion]) -> Verdict:
        """The verdict of all texts asked: unsafe where one says so, safe where all do."""
        read = [self._read(completion) for completion in completions]
        if not read:
            return UNREADABLE
        worse: tuple[Label, ...] = ("unsafe", "unreadable")
        label: Label = next((label for label in worse if any(v.label == label for v in read)), "safe")
        scores = [verdict.score for verdict in read if verdict.score is not None]
        worst = max(read, key=lambda verdict: (verdict.label == label, verdict.score or 0.0))
        return replace(worst, label=label, score=max(scores) if scores else None)

    def _read(self, completion: Completion) -> Verdict:
        if not completion.finished and self.family.words is None:
            # Cut at the limit: what stands last may be a verdict that the guard was quoting.
            return Verdict("unreadable", raw=completion.text)
        verdict = self.family.read(completion.text)
        if completion.first_logits is None:
            return verdict
        unsafe, safe = (completion.first_logits[token] for token in self.words)
        return replace(verdict, score=(unsafe - safe).sigmoid().item())


def _first_token(tokenizer: Any, word: str) -> int:
    return int(tokenizer(word, add_special_tokens=False)["input_ids"][0])
