"""One way from text to token ids, for the probe, training and evaluation alike.

Prompt and response are tokenised *separately* and joined, so the boundary between masked and learned tokens is exact
and a prompt has the same ids whatever follows it (no token can straddle the two). With a chat template the rendered
conversation is tokenised whole, as the template's model saw it, and divided by `chat`. The rules:

* **BOS** stands once, first, where the tokenizer itself would put one; with a chat template the template decides.
* **EOS** follows a response that was not cut, and only then: a model must not learn that a cut is an end. With a chat
  template the template's own end of turn takes its place.
* **Truncation** happens only beyond `max_length`. Then the prompt keeps `max_prompt_length` tokens, or what the
  response leaves of `max_length` where that is more; it is cut from the left (BOS stays), so its assistant marker
  stays. The response is cut from the right to what is left. With a chat template the oldest exchanges go first, whole;
  then the beginning of the last question. BOS, system message and headers stay. `Encoded` tells what was cut.
* **A pair** shares one prompt: `encode_pair` cuts it once, by the longer response, so both log-probabilities are
  conditioned on the same tokens.
* **Padding** is on the right with the tokenizer's pad token, else its EOS, else id 0; attention mask and labels follow
  lengths, never ids, so the choice changes no number. The tokenizer is not modified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shapo.checked import checked
from shapo.data.chat import ChatTemplate, Message, Turn, common_length
from shapo.data.pairs import parse_transcript
from shapo.errors import UserError
from shapo_kernels.errors import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE_INDEX", "Encoded", "PairEncoder", "keep_end", "warn_of_cuts", "without_oldest_exchange"]

IGNORE_INDEX = -100

_CHUNK = 512  # examples that are tokenised at once: fast tokenizers work on several texts in parallel


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + response; the first `prompt_length` are the prompt's and are not learned.

    `prompt_cut` and `response_cut` are the numbers of tokens that the length left out.
    """

    input_ids: list[int]
    prompt_length: int
    prompt_cut: int = 0
    response_cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@checked
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
        UserError: lengths that leave no room; no EOS token; no chat template, or one that shows no answer. While
            encoding: a token that the model has no embedding for, a text that is longer than its positions, a
            conversation that the chat template refuses or in which the answer cannot be told from the prompt.
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
                f"max_prompt_length is {max_prompt_length} and max_length {max_length}; expected 0 < prompt < whole: "
                "give a lower max_prompt_length"
            )
        if pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of is {pad_to_multiple_of}; expected at least 1")
        if eos and tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token; give it one or pass eos=False")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.eos = eos
        self.chat_template = chat_template
        self.pad_to_multiple_of = pad_to_multiple_of
        self.vocabulary = vocabulary
        self.positions = positions
        self._chat = ChatTemplate(tokenizer, eos=eos) if chat_template else None
        self._bos = [] if chat_template else _leading_bos(tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The id that fills batches: the pad token's, else EOS's, else 0. It is masked everywhere."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in known if token is not None))

    def encode(self, prompt: str, response: str) -> Encoded:
        """Encode one prompt with one response. For the two responses of a pair use `encode_pair`."""
        ((encoded,),) = self._encode([(prompt, (response,))], named=False)
        return encoded

    def encode_pair(self, prompt: str, chosen: str, rejected: str) -> tuple[Encoded, Encoded]:
        """Encode both responses after one and the same prompt, cut by the longer response where it must be cut."""
        ((first, second),) = self._encode([(prompt, (chosen, rejected))], named=False)
        return first, second

    def encode_pairs(self, pairs: Iterable[tuple[str, str, str]]) -> list[tuple[Encoded, Encoded]]:
        """`encode_pair` of every (prompt, chosen, rejected); an error names the pair, counted from 1."""
        return list(self.each_pair(pairs))

    def each_pair(self, pairs: Iterable[tuple[str, str, str]]) -> Iterator[tuple[Encoded, Encoded]]:
        """`encode_pairs` as an iterator, which holds the tokens of a few hundred pairs at once."""
        examples = ((prompt, (chosen, rejected)) for prompt, chosen, rejected in pairs)
        return ((chosen, rejected) for chosen, rejected in self._encode(examples))

    def encode_prompt(self, prompt: str, *, max_new_tokens: int = 0) -> list[int]:
        """The prompt's ids for generation, cut as if a response of `max_new_tokens` tokens followed."""
        ((prompt_ids, _),) = self._tokenise([(prompt, ())])
        prompt_ids = self._fit_prompt(prompt, (), prompt_ids, max_new_tokens)
        self._require_positions(len(prompt_ids) + max_new_tokens)
        self._require_embeddings(prompt_ids)
        return prompt_ids

    def collate(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad on the right: `input_ids`, `attention_mask`, `labels`, each int64 `[B, T]`.

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
            "tokenizer": tokenizer_digest(self.tokenizer),
        }

    def _encode(self, examples: Iterable[tuple[str, Sequence[str]]], *, named: bool = True) -> Iterator[list[Encoded]]:
        """Every prompt with each of its responses, after one and the same form of the prompt."""
        remaining, done = iter(examples), 0
        while chunk := list(islice(remaining, _CHUNK)):
            numbers = [number if named else 0 for number in range(done + 1, done + 1 + len(chunk))]
            tokens = self._tokenise(chunk, numbers)
            for number, (prompt, responses), ids in zip(numbers, chunk, tokens, strict=True):
                with _about_pair(number):
                    encoded = self._fit(prompt, responses, *ids)
                yield encoded
            done += len(chunk)

    def _tokenise(
        self, examples: Sequence[tuple[str, Sequence[str]]], numbers: Sequence[int] = (0,)
    ) -> list[tuple[list[int], list[list[int]]]]:
        """The ids of every prompt and of its responses, uncut."""
        if self._chat is None:
            texts = [text for prompt, responses in examples for text in (prompt, *responses)]
            ids = iter(self._ids(texts))
            end = [int(self.tokenizer.eos_token_id)] if self.eos else []
            return [
                (self._bos + next(ids), [next(ids) + end for _ in responses])  # in the order of `texts`
                for _, responses in examples
            ]
        turns = []
        for number, (prompt, responses) in zip(numbers, examples, strict=True):
            with _about_pair(number):
                answers = [response.removeprefix(" ") for response in responses]
                turns.append(self._chat.turn(parse_transcript(prompt), answers))
        return self._divide(turns)

    def _divide(self, turns: Sequence[Turn]) -> list[tuple[list[int], list[list[int]]]]:
        assert self._chat is not None
        places = [self._chat.split_place(turn) for turn in turns]
        texts = []
        for turn, place in zip(turns, places, strict=True):
            texts += [turn.opened[:place], *(text[place:] for text in (turn.opened, *turn.answered))]
        ids = iter(self._ids(texts))
        end = [int(self.tokenizer.eos_token_id)] if self._chat.adds_eos else []
        divided = []
        for turn in turns:
            head, opened, answered = next(ids), next(ids), [next(ids) for _ in turn.answered]
            length = self._chat.boundary(turn, opened, answered)
            prompt = head + (answered or [opened])[0][:length]
            divided.append((prompt, [whole[length:] + end for whole in answered]))
        return divided

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]) if texts else []

    def _fit(
        self, prompt: str, responses: Sequence[str], prompt_ids: list[int], response_ids: list[list[int]]
    ) -> list[Encoded]:
        kept = self._fit_prompt(prompt, responses, prompt_ids, max(map(len, response_ids)))
        cut = len(prompt_ids) - len(kept)
        encoded = []
        for ids in response_ids:
            whole = [*kept, *ids[: self.max_length - len(kept)]]
            encoded.append(Encoded(whole, len(kept), cut, len(kept) + len(ids) - len(whole)))
            self._require_positions(len(whole))
            self._require_embeddings(whole)
        return encoded

    def _fit_prompt(
        self, prompt: str, responses: Sequence[str], prompt_ids: list[int], longest_response: int
    ) -> list[int]:
        """The prompt's ids, cut where they do not fit beside a response of `longest_response` tokens."""
        if len(prompt_ids) + longest_response <= self.max_length:
            return prompt_ids
        room = max(self.max_prompt_length, self.max_length - longest_response)
        if self._chat is None:
            return keep_end(prompt_ids, room, len(self._bos))
        messages: Sequence[Message] = parse_transcript(prompt)
        while len(prompt_ids) > room and (fewer := without_oldest_exchange(messages)) is not None:
            messages = fewer
            answers = [response.removeprefix(" ") for response in responses]
            ((prompt_ids, _),) = self._divide([self._chat.turn(messages, answers)])
        if len(prompt_ids) <= room:
            return prompt_ids
        one, other = self._ids(self._chat.head(messages))
        head, tail = common_length(one, other), common_length(one[::-1], other[::-1])
        if head + tail > room:  # a system message without room keeps BOS alone
            head = int(prompt_ids[0] == self.tokenizer.bos_token_id)
        return keep_end(prompt_ids, room, head)

    def _require_embeddings(self, ids: Sequence[int]) -> None:
        if self.vocabulary is not None and (largest := max(ids, default=0)) >= self.vocabulary:
            raise UserError(
                f"the tokenizer gives the id {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}), but the "
                f"model has {self.vocabulary} token embeddings; the tokenizer is another model's"
            )

    def _require_positions(self, length: int) -> None:
        if self.positions is not None and length > self.positions:
            raise UserError(
                f"a text of {length} tokens was allowed (max_length is {self.max_length}), but the model has "
                f"{self.positions} positions; lower the length"
            )


def warn_of_cuts(examples: Iterable[Encoded], max_length: int) -> None:
    """One warning with the numbers of prompts and responses that the length has cut; none where nothing was."""
    cut = [example for example in examples if example.prompt_cut or example.response_cut]
    if cut:
        prompts = sum(example.prompt_cut > 0 for example in cut)
        responses = sum(example.response_cut > 0 for example in cut)
        warn(f"{len(cut)} texts have more than {max_length} tokens: {prompts} prompts, {responses} responses are cut")


def without_oldest_exchange(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without the first question and what follows it up to the next; None where there is no next."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    following = next((index for index in users if index > first), None)
    return None if following is None else [*messages[:first], *messages[following:]]


@contextmanager
def _about_pair(number: int) -> Iterator[None]:
    """Errors inside tell the pair, unless its number is 0."""
    try:
        yield
    except UserError as error:
        raise (UserError(f"pair {number}: {error}") if number else error) from error


def keep_end(prompt: list[int], room: int, head: int) -> list[int]:
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


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what the tokenizer does: its full description where it is a fast one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps([tokenizer.bos_token, tokenizer.eos_token, str(tokenizer.chat_template)])
    return hashlib.sha256((description + special).encode()).hexdigest()
