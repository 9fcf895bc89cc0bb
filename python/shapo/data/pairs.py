"""The records that every loader produces and every consumer takes, and the one transcript form of their prompts.

A prompt is text. Formats that give turns or bare questions are rendered into one transcript,

    \\n\\nHuman: first question\\n\\nAssistant: first answer\\n\\nHuman: second question\\n\\nAssistant:

which ends with the assistant marker; the response then begins with a space. This is the form that hh-rlhf is published
in. Nothing here reads files (`formats`) or knows a tokenizer (`tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from shapo.errors import UserError

__all__ = [
    "ASSISTANT_MARKER",
    "MARKERS",
    "ROLES",
    "EvaluationPrompt",
    "PairSet",
    "PreferencePair",
    "PromptSet",
    "is_transcript",
    "parse_transcript",
    "render_response",
    "render_transcript",
]

ASSISTANT_MARKER = "\n\nAssistant:"

MARKERS = {"system": "\n\nSystem:", "user": "\n\nHuman:", "assistant": ASSISTANT_MARKER}
ROLES = tuple(MARKERS)
_ROLE_OF = {marker: role for role, marker in MARKERS.items()}
_ANY_MARKER = re.compile("|".join(re.escape(marker) for marker in _ROLE_OF))
_INNER_MARKER = re.compile(r"\n{2,}(?=(?:Human|Assistant|System):)")


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: after `prompt`, `chosen` was preferred to `rejected`.

    `chosen_unsafe` and `rejected_unsafe` are about the texts (None where the data does not say) and follow them when a
    label is flipped. `flipped` tells that the two were exchanged as label noise.
    """

    prompt: str
    chosen: str
    rejected: str
    category: str = ""
    chosen_unsafe: bool | None = None
    rejected_unsafe: bool | None = None
    flipped: bool = False


@dataclass
class PairSet(Sequence[PreferencePair]):
    """Pairs in the order of their file, and how many rows were left out for each reason.

    `messages` tells that the rows were lists of messages, for which a tokenizer's chat template is the natural form
    (`PairEncoder(..., chat_template=True)`).
    """

    pairs: list[PreferencePair]
    dropped: dict[str, int] = field(default_factory=dict)
    source: str = ""
    format: str = ""
    messages: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PreferencePair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        return self.pairs[index]

    def summary(self) -> str:
        """One line for logs: how many pairs, from where, what was left out and why."""
        return _summary(len(self.pairs), "pairs", self.source, self.dropped)


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt to generate an answer for. `identifier` is the data set's own, or the row number, and stays fixed."""

    prompt: str
    category: str = ""
    identifier: str = ""


@dataclass
class PromptSet(Sequence[EvaluationPrompt]):
    """Prompts in the order of their file, and how many rows were left out for each reason."""

    prompts: list[EvaluationPrompt]
    dropped: dict[str, int] = field(default_factory=dict)
    source: str = ""
    format: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[EvaluationPrompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, index: int) -> EvaluationPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[EvaluationPrompt]: ...
    def __getitem__(self, index: int | slice) -> EvaluationPrompt | list[EvaluationPrompt]:
        return self.prompts[index]

    def summary(self) -> str:
        """One line for logs: how many prompts, from where, what was left out and why."""
        return _summary(len(self.prompts), "prompts", self.source, self.dropped)


def _summary(count: int, kind: str, source: str, dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
    return f"{count} {kind} from {source or 'memory'}" + (f" (left out: {reasons})" if reasons else "")


def render_transcript(messages: Sequence[Mapping[str, str]]) -> str:
    """The transcript of `messages`, ending with the assistant marker: a prompt.

    A marker that occurs inside a message loses its empty line, so that no text can pass for another turn and
    `parse_transcript` gives the messages back.

    Raises:
        UserError: a role other than system, user or assistant.
    """
    parts = []
    for message in messages:
        role = message["role"]
        if role not in MARKERS:
            raise UserError(f"a message has the role {role!r}; expected one of {', '.join(MARKERS)}")
        content = _INNER_MARKER.sub("\n", message["content"])
        parts.append(f"{MARKERS[role]} {content}")
    return "".join(parts) + ASSISTANT_MARKER


def render_response(text: str) -> str:
    """The response as it follows the assistant marker: one leading space."""
    return f" {text.lstrip(' ')}"


def is_transcript(text: str) -> bool:
    """Whether `text` is a prompt in the form of `render_transcript`: turns from the first character, an answer due."""
    return _ANY_MARKER.match(text) is not None and text.endswith(ASSISTANT_MARKER)


def parse_transcript(prompt: str) -> list[dict[str, str]]:
    """The messages of a transcript prompt; a prompt without markers is one user message.

    The assistant marker at the end opens the response and is no message. Contents are what `render_transcript` was
    given: the one space behind a marker is the transcript's, other white space the message's.
    """
    matches = list(_ANY_MARKER.finditer(prompt))
    head = prompt[: matches[0].start()] if matches else prompt
    messages = [{"role": "user", "content": head.strip()}] if head.strip() or not matches else []
    ends = [match.start() for match in matches[1:]] + [len(prompt)]
    for match, end in zip(matches, ends, strict=False):
        content = prompt[match.end() : end].removeprefix(" ")
        messages.append({"role": _ROLE_OF[match.group()], "content": content})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages
