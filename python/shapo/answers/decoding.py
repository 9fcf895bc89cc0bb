"""Decoding by transformers in left-padded batches. Engines take prompts as token ids and know no file.

Greedy is the argmax of the model's own logits: a stored generation_config with beams, penalties or a top_k is set aside
while an engine works. A sampled answer has its own stream of random numbers, so it does not depend on the batch that it
fell into: noise of the Gumbel distribution, drawn from the answer's generator, is added to the scaled logits and the
largest one taken, which is a draw from their softmax (Gumbel-max).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shapo.answers.turns import Ending
from shapo.models.modes import evaluating


@dataclass(frozen=True)
class Request:
    """A prompt's ids, and the seed of its own random numbers (used where the temperature is above 0)."""

    ids: list[int]
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What was generated behind a prompt.

    Attributes:
        text: Without special tokens and without what ended it.
        finished: Whether it ended by itself, not at the limit of new tokens.
        tokens: Number of generated tokens, the ending one not counted.
        first_logits: Logits of the first new token, fp32 on the CPU, where they were asked for.
    """

    text: str
    finished: bool
    tokens: int
    first_logits: Tensor | None = None


class Engine(Protocol):
    """Completes requests in their order; `done` is told the results of each batch as (indices, completions)."""

    def complete(
        self, requests: Sequence[Request], done: Callable[[list[int], list[Completion]], None] | None = None
    ) -> list[Completion]: ...


class TransformersEngine:
    """A causal language model of transformers with its tokenizer.

    Args:
        model: In any mode; it works in eval mode and is left as it was.
        tokenizer: Decodes; its pad token, else EOS, else 0 fills batches, on the left.
        end: What ends a completion.
        max_new_tokens: Most tokens of one.
        temperature: 0 is greedy.
        batch_size: Prompts through the model at once; neighbours in length share a batch.
        first_logits: Keep the logits of each first token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        end: Ending,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        batch_size: int = 16,
        first_logits: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.end = model, tokenizer, end
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.batch_size, self.first_logits = batch_size, first_logits

    @torch.no_grad()
    def complete(
        self, requests: Sequence[Request], done: Callable[[list[int], list[Completion]], None] | None = None
    ) -> list[Completion]:
        results: dict[int, Completion] = {}
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].ids))
        with evaluating(self.model), _plain_generation(self.model):
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                completions = self._batch([requests[index] for index in indices])
                results.update(zip(indices, completions, strict=True))
                if done:
                    done(indices, completions)
        return [results[index] for index in range(len(requests))]

    def _batch(self, requests: Sequence[Request]) -> list[Completion]:
        device = next(self.model.parameters()).device
        width = max(len(request.ids) for request in requests)
        pad = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)
        ids = torch.tensor([[pad] * (width - len(r.ids)) + r.ids for r in requests], device=device)
        mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in requests], device=device)
        options: dict[str, Any] = {}
        if self.temperature > 0:
            options["logits_processor"] = [_GumbelNoise(self.temperature, [request.seed for request in requests])]
        if self.end.texts:
            options |= {"stop_strings": list(self.end.texts), "tokenizer": self.tokenizer}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=list(self.end.ids) or None,
            return_dict_in_generate=True,
            output_logits=self.first_logits,
            **options,
        )
        first = output.logits[0].float().cpu() if self.first_logits else [None] * len(requests)
        rows = output.sequences[:, width:].tolist()
        return [self._completion(row, logits) for row, logits in zip(rows, first, strict=True)]

    def _completion(self, row: list[int], first: Tensor | None) -> Completion:
        length = next((n for n, token in enumerate(row) if token in self.end.ids), len(row))
        text, stopped = cut(self.tokenizer.decode(row[:length], skip_special_tokens=True), self.end)
        return Completion(text, stopped or length < len(row) or length < self.max_new_tokens, length, first)


def cut(text: str, end: Ending) -> tuple[str, bool]:
    """The text before the first ending string, and whether there was one."""
    places = [place for place in (text.find(string) for string in end.texts) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


class _GumbelNoise:
    """A logits processor: logits / temperature - log(-log u), u uniform from each row's own generator."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # On the CPU and in fp64: the same numbers on every device, and no u of 0 or 1 in practice.
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=generator, dtype=torch.float64) for generator in self.generators]
        )
        noise = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores.double() / self.temperature + noise.to(scores.device)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Sets the stored generation_config aside: `generate` takes from it whatever a call leaves open."""
    from transformers import GenerationConfig

    stored = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored
