"""One way from text to token ids, for the probe, training and evaluation alike.

Prompt and response are tokenised *separately* and joined, so the boundary between masked and learned tokens is exact
and a prompt has the same ids whatever follows it (no token can straddle the two). The rules:

* **BOS** stands once, first, where the tokenizer itself would put one; with a chat template the template decides.
* **EOS** follows a response that was not cut, and only then: a model must not learn that a cut is an end. With a chat
  template the template's own end of turn takes its place.
* **Truncation** happens only beyond `max_length`. Then the prompt keeps `max_prompt_length` tokens, or what the
  response leaves of `max_length` where that is more; it is cut from the left (BOS stays), so its assistant marker
  stays. The response is cut from the right to what is left. No token of the budget is wasted.
* **A pair** shares one prompt: `encode_pair` cuts it once, by the longer response, so both log-probabilities are
  conditioned on the same tokens.
* **Padding** is on the right with the tokenizer's pad token, else its EOS, else id 0; attention mask and labels follow
  lengths, never ids, so the choice changes no number. The tokenizer is not modified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shapo.data.pairs import parse_transcript
from shapo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE_INDEX", "Encoded", "PairEncoder"]

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + response; the first `prompt_length` are the prompt's and are not learned."""

    input_ids: list[int]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)


class PairEncoder:
    """Encodes (prompt, response) by the rules of this module.

    Args:
        tokenizer: any Hugging Face tokenizer. It is read, never changed.
        max_length: most tokens of prompt + response together, BOS and EOS included.
        max_prompt_length: tokens that the prompt may keep when the response is long.
        eos: end a response that was not cut with EOS (or with the chat template's end of turn).
        chat_template: render prompts by the tokenizer's chat template: transcripts are parsed into their turns, any
            other prompt is one user message. The default takes the prompt's text as it is.
        pad_to_multiple_of: round the length of batches up to a multiple of this.
        vocabulary: number of the model's token embeddings, where ids are to be checked against it.
        positions: number of the model's learned positions, where lengths are to be checked against it.

    Raises:
        UserError: lengths that leave no room; no EOS token; no chat template. While encoding: a token that the model
            has no embedding for, a text that is longer than its positions.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        max_prompt_length: int = 256,
        eos: bool = True,
        chat_template: bool = False,
        pad_to_multiple_of: int = 1,
        vocabulary: int | None = None,
        positions: int | None = None,
    ) -> None:
        if not 0 < max_prompt_length < max_length:
            raise UserError(
                f"max_prompt_length is {max_prompt_length} and max_length {max_length}; expected 0 < prompt < whole"
            )
        if pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of is {pad_to_multiple_of}; expected at least 1")
        if eos and tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token; give it one or pass eos=False")
        if chat_template and not tokenizer.chat_template:
            raise UserError("chat_template=True, but the tokenizer has no chat template")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.eos = eos
        self.chat_template = chat_template
        self.pad_to_multiple_of = pad_to_multiple_of
        self.vocabulary = vocabulary
        self.positions = positions
        self._bos = [] if chat_template else _leading_bos(tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The id that fills batches: the pad token's, else EOS's, else 0. It is masked everywhere."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def encode(self, prompt: str, response: str) -> Encoded:
        """Encode one prompt with one response. For the two responses of a pair use `encode_pair`."""
        prompt_ids, responses = self._tokenise(prompt, [response])
        return self._fit(prompt_ids, responses[0], len(responses[0]))

    def encode_pair(self, prompt: str, chosen: str, rejected: str) -> tuple[Encoded, Encoded]:
        """Encode both responses after one and the same prompt, cut by the longer response where it must be cut."""
        prompt_ids, responses = self._tokenise(prompt, [chosen, rejected])
        longest = max(map(len, responses))
        return self._fit(prompt_ids, responses[0], longest), self._fit(prompt_ids, responses[1], longest)

    def encode_prompt(self, prompt: str, *, max_new_tokens: int = 0) -> list[int]:
        """The prompt's ids for generation, cut as if a response of `max_new_tokens` tokens followed."""
        prompt_ids, _ = self._tokenise(prompt, [])
        encoded = self._fit(prompt_ids, [], max_new_tokens)
        self._require_positions(len(encoded) + max_new_tokens)
        return encoded.input_ids

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad on the right: `input_ids`, `attention_mask`, `labels`, each int64 ``[B, T]``.

        Labels lie beside their inputs, as Hugging Face models expect, and are -100 on prompt and padding.

        Raises:
            ValueError: no examples.
        """
        if not examples:
            raise ValueError("collate got no examples; a batch needs at least one")
        multiple = self.pad_to_multiple_of
        width = -(-max(map(len, examples)) // multiple) * multiple
        input_ids = torch.full((len(examples), width), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, example in enumerate(examples):
            ids = torch.tensor(example.input_ids, dtype=torch.int64)
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            labels[row, example.prompt_length : len(ids)] = ids[example.prompt_length :]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """Everything that decides the ids of a text, for cache keys and metadata; the tokenizer is named by a hash."""
        return {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "eos": self.eos,
            "chat_template": self.chat_template,
            "tokenizer": _tokenizer_hash(self.tokenizer),
        }

    def _tokenise(self, prompt: str, responses: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        if not self.chat_template:
            end = [int(self.tokenizer.eos_token_id)] if self.eos else []
            return self._bos + self._ids(prompt), [self._ids(response) + end for response in responses]
        messages = parse_transcript(prompt)
        opened = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return self._ids(opened), [self._answer(messages, opened, response.strip()) for response in responses]

    def _answer(self, messages: list[dict[str, str]], opened: str, response: str) -> list[int]:
        """The response as the template writes it; with `eos` also what ends the turn, less the break between turns."""
        answered = [*messages, {"role": "assistant", "content": response}]
        whole = str(self.tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False))
        turn = whole[len(opened) :].rstrip() if whole.startswith(opened) else ""
        start = len(turn) - len(turn.lstrip())
        if turn.startswith(response, start):
            closed = len(turn) > start + len(response)
            turn = turn if self.eos else turn[: start + len(response)]
        else:  # the template renders an answered turn differently from an opened one
            closed, turn = False, response
        end = [int(self.tokenizer.eos_token_id)] if self.eos and not closed else []
        return self._ids(turn) + end

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _fit(self, prompt: list[int], response: list[int], longest_response: int) -> Encoded:
        if len(prompt) + longest_response > self.max_length:
            room = max(self.max_prompt_length, self.max_length - longest_response)
            prompt = _keep_end(prompt, room, len(self._bos))
        response = response[: self.max_length - len(prompt)]
        encoded = Encoded([*prompt, *response], len(prompt))
        self._require_positions(len(encoded))
        if self.vocabulary is not None and (largest := max(encoded.input_ids, default=0)) >= self.vocabulary:
            raise UserError(
                f"the tokenizer gives the id {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}), but the "
                f"model has {self.vocabulary} token embeddings; the tokenizer is another model's"
            )
        return encoded

    def _require_positions(self, length: int) -> None:
        if self.positions is not None and length > self.positions:
            raise UserError(
                f"a text of {length} tokens was allowed (max_length is {self.max_length}), but the model has "
                f"{self.positions} positions; lower the length"
            )


def _keep_end(prompt: list[int], room: int, head: int) -> list[int]:
    """The last tokens of the prompt behind its first `head` (BOS), `room` in all."""
    if len(prompt) <= room:
        return prompt
    head = min(head, room)
    return prompt[:head] + prompt[len(prompt) - (room - head) :]


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer puts it before a text by itself, else []."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    return [int(bos)] if list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what the tokenizer does: its full description where it is a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps([tokenizer.bos_token, tokenizer.eos_token, str(tokenizer.chat_template)])
    return hashlib.sha256((description + special).encode()).hexdigest()
