"""A tokenizer's chat template: what it writes before an answer, as the answer, and where the one becomes the other.

The rendered conversation is the truth. What is trained is what the template writes for the answered turn, its end of
turn included, and the prompt is what stands before it, as TRL's `DPOTrainer` divides the two: the answer begins where
the tokens of the answered conversation leave those of the generation prompt. A template that shows neither that place
nor `{% generation %}` marks is refused. Lengths are for `tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shapo.errors import UserError
from shapo_kernels.errors import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Message", "Turn", "common_length"]

Message = Mapping[str, str]

# Digits stay what they are where a template trims, capitalises or escapes. First and last characters differ.
_QUESTION, _ANSWERS = "60221", ("31415", "27182")


@dataclass(frozen=True)
class Turn:
    """A prompt with its answers as the template writes them: text to tokenise, without added special tokens."""

    messages: Sequence[Message]
    responses: Sequence[str]
    opened: str
    answered: tuple[str, ...]


class ChatTemplate:
    """Renders conversations by the tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template. It is read, never changed.
        eos: keep what the template writes after an answer up to its last visible character (the end of turn). A
            template that writes nothing visible there has no end of turn; then `adds_eos` is true.

    Raises:
        UserError: there is no chat template, or it fails, or it leaves the question or the answer out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, eos: bool) -> None:
        if not tokenizer.chat_template:
            raise UserError("chat_template=True, but the tokenizer has no chat template")
        self._tokenizer = tokenizer
        self._warned = False
        self._in_parts = self._content_form()
        first, second = (self._render([_question(), _assistant(answer)]) for answer in _ANSWERS)
        self._closing = _common_end(first, second)
        self._end_of_turn = self._closing.rstrip() if eos else ""
        self.adds_eos = eos and not self._end_of_turn
        self._marks = self._splitting_tokens()

    def turn(self, messages: Sequence[Message], responses: Sequence[str]) -> Turn:
        """The generation prompt after `messages`, and the whole conversation with each of the responses.

        Raises:
            UserError: the template refuses the conversation.
        """
        opened = self._render(messages, add_generation_prompt=True)
        answered = (self._render([*messages, _assistant(response)]) for response in responses)
        # The break between turns behind the end of turn is nothing that a model generates.
        ended = (whole.removesuffix(self._closing) + self._end_of_turn for whole in answered)
        return Turn(messages, responses, opened, tuple(ended))

    def conversation(self, messages: Sequence[Message]) -> str:
        """All of `messages` as the template writes them, to the last character.

        Raises:
            UserError: the template refuses them.
        """
        return self._render(messages)

    def split_place(self, turn: Turn) -> int:
        """Length of a beginning of all texts of `turn` that can be tokenised once, by itself; 0 where there is none.

        Tokenizers take special tokens out first and everything between two of them by itself, so the texts may be
        divided before the last one of the generation prompt without changing an id.
        """
        if not all(whole.startswith(turn.opened) for whole in turn.answered):
            return 0
        return max((turn.opened.rfind(mark) for mark in self._marks), default=0)

    def boundary(self, turn: Turn, opened: Sequence[int], answered: Sequence[Sequence[int]]) -> int:
        """Number of leading tokens of every answered conversation that are its prompt.

        Args:
            turn: texts.
            opened: the tokens of `turn.opened`.
            answered: the tokens of each of `turn.answered`.

        Raises:
            UserError: prompt and answer cannot be told apart.
        """
        length = min((common_length(opened, whole) for whole in answered), default=len(opened))
        if length == len(opened):
            return length
        # Only the generation prompt may differ: where the answer's header and an opened thought would be.
        asked = turn.opened[: common_length(turn.opened, self._render(turn.messages))]
        if not all(whole.startswith(asked) for whole in turn.answered):
            length = self._marked(turn, answered)
        if not self._warned:
            self._warned = True
            warn(
                "the chat template writes the generation prompt otherwise than the beginning of an answered turn, or a "
                "token lies across the two; training leaves out "
                f"{self._tokenizer.decode(list(opened[length:]))!r}, which stands before every generated answer"
            )
        return length

    def head(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The prompt of `messages` with two other contents of the first message that is not the system's.

        What the two have in common at the beginning stands before that content (BOS, system message, header).
        """
        first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
        one, other = (
            self._render(
                [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]],
                add_generation_prompt=True,
            )
            for content in _ANSWERS
        )
        return one, other

    def _marked(self, turn: Turn, answered: Sequence[Sequence[int]]) -> int:
        """The token where the last span of `{% generation %}` begins, the same in every answered conversation."""
        starts = [self._last_generation([*turn.messages, _assistant(response)]) for response in turn.responses]
        prompts = {tuple(ids[:start]) for ids, start in zip(answered, starts, strict=True)}
        if 0 in starts or len(prompts) != 1:
            raise UserError(
                "the chat template writes the messages before an answer otherwise once an answer follows, and marks "
                "none by {% generation %}, so what to learn cannot be told; give the tokenizer a template for training"
            )
        return starts[0]

    def _last_generation(self, conversation: Sequence[Message]) -> int:
        """Index of the first token of the last marked span; 0 without marks."""
        mask = self._apply(conversation, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
        end = max((index for index, marked in enumerate(mask) if marked), default=0)
        while end > 0 and mask[end - 1]:
            end -= 1
        return end

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return str(self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        if self._in_parts:
            for message in conversation:
                message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            return self._tokenizer.apply_chat_template(conversation, **options)
        except Exception as error:  # a template is a program of its own and may fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the chat template refuses a conversation: {reason}") from error

    def _splitting_tokens(self) -> tuple[str, ...]:
        """Special tokens of the generation prompt, where dividing before one of them changes no id."""
        opened = self._render([_question()], add_generation_prompt=True)
        found = [str(token) for token in set(self._tokenizer.all_special_tokens) if opened.rfind(token) > 0]
        whole = self._ids(opened)
        places = {mark: opened.rfind(mark) for mark in found}
        return tuple(mark for mark, at in places.items() if self._ids(opened[:at]) + self._ids(opened[at:]) == whole)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _content_form(self) -> bool:
        """Whether content is to be given in parts: the first of the two forms in which question and answer are shown.

        A template that wants parts may render a text as nothing, or raise.
        """
        failure = UserError("the chat template writes neither question nor answer of a conversation, as text or parts")
        for self._in_parts in (False, True):
            try:
                if self._shows_content():
                    return self._in_parts
            except UserError as error:
                failure = error
        raise failure

    def _shows_content(self) -> bool:
        return _QUESTION in self._render([_question()], add_generation_prompt=True) and all(
            answer in self._render([_question(), _assistant(answer)]) for answer in _ANSWERS
        )


def _question() -> Message:
    return {"role": "user", "content": _QUESTION}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Number of leading ids or characters that two texts have in common."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _common_end(one: str, other: str) -> str:
    return one[len(one) - common_length(one[::-1], other[::-1]) :]
