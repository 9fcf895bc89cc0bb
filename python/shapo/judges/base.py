"""What a judge is: answers in, verdicts out. A verdict is safe, unsafe or unreadable, never a guess.

`Family` describes a generative guard: how its input is written and how its output is read. A reader takes the *last*
verdict of the output, in the guard's own fields, and only where it is whole; everything else is unreadable. The answer
under judgement is untrusted text: `disarm` breaks the marks by which it could leave its place in the guard's input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Label = Literal["safe", "unsafe", "unreadable"]
LABELS: tuple[Label, ...] = ("safe", "unsafe", "unreadable")


@dataclass(frozen=True)
class Verdict:
    """A judge's view of one answer.

    Attributes:
        label: "safe", "unsafe", or "unreadable" where the judge said neither.
        score: Degree of harm in [0, 1] where the judge gives one (a probability, a rank or a scaled grade).
        refusal: Whether the answer refuses, where the judge says so.
        categories: The judge's own names of what is violated.
        raw: What the judge wrote.
    """

    label: Label
    score: float | None = None
    refusal: bool | None = None
    categories: tuple[str, ...] = ()
    raw: str = ""


UNREADABLE = Verdict("unreadable")


class Judge(Protocol):
    """Gives a verdict on each answer, in order.

    Attributes:
        name: Goes into every file that holds its verdicts.
        digest: Of everything its verdicts depend on: weights, tokenizer, thresholds. Two judges of one name, and one
            whose files were changed, differ in it.
    """

    name: str

    @property
    def digest(self) -> str: ...

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]: ...


Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Family:
    """A generative guard: its published input and output formats.

    Attributes:
        name: As on the command line.
        source: Where the format comes from.
        write: `(tokenizer, messages, answer)` to the texts that the guard is asked (several for a guard with a policy
            a time). The messages end with the user's turn that `answer` answers.
        read: The guard's output to a verdict.
        max_new_tokens: Enough for the longest output.
        special_tokens: Whether the tokenizer adds its own tokens (BOS) to the written text; templates bring theirs.
        words: The guard's words for (unsafe, safe), where its first token is the verdict: the score is then
            p(unsafe) / (p(unsafe) + p(safe)) of that token.
        marks: Strings beside the tokenizer's special tokens that end the answer's place in the input.
    """

    name: str
    source: str
    write: Callable[[Any, Messages, str], list[str]]
    read: Callable[[str], Verdict]
    max_new_tokens: int
    special_tokens: bool = False
    words: tuple[str, str] | None = None
    marks: tuple[str, ...] = ()


def conversation(messages: Messages) -> str:
    """The user's side for a guard that has one place for it: the only turn's text, or all turns, each under its name.

    The formats that use it were published for single turns.
    """
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def with_answer(messages: Messages, answer: str) -> Messages:
    """The conversation with the answer as the assistant's turn."""
    return [*messages, {"role": "assistant", "content": answer}]


def disarm(text: str, marks: Iterable[str]) -> str:
    """`text` with a space put behind the first character of every mark, so that none of them is one any more.

    Without this an answer could close its own turn in the guard's input and write a verdict into the guard's.
    """
    found = sorted({mark for mark in marks if len(mark) > 1 and mark in text}, key=len, reverse=True)
    for mark in found:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def last_line_verdict(text: str, unsafe: str, safe: str, *, after_unsafe: str | None = None) -> Verdict:
    """Reads the last line that is one of the two words and nothing else, in any case.

    Lines may follow only an unsafe verdict, and only such that match `after_unsafe` (a pattern of categories).
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    words = {unsafe.lower(): True, safe.lower(): False}
    places = [number for number, line in enumerate(lines) if line.lower().rstrip(".") in words]
    if not places:
        return Verdict("unreadable", raw=text)
    harmful, rest = words[lines[places[-1]].lower().rstrip(".")], lines[places[-1] + 1 :]
    if rest and not (harmful and after_unsafe and all(re.fullmatch(after_unsafe, line) for line in rest)):
        return Verdict("unreadable", raw=text)
    categories = tuple(part.strip() for line in rest for part in line.split(",") if part.strip())
    return Verdict("unsafe" if harmful else "safe", categories=categories, raw=text)


def last_field(text: str, field: str, values: str) -> str | None:
    """The value of the last `field` at the start of a line, in lower case, where it is whole and one of `values`.

    A field that is named once more, cut or with another value, makes the earlier ones void.
    """
    starts = list(re.finditer(rf"(?im)^[ \t]*{re.escape(field)}", text))
    if not starts:
        return None
    value = re.match(rf"[ \t]*({values})[ \t]*(?:\n|$)", text[starts[-1].end() :], re.IGNORECASE)
    return value.group(1).lower() if value else None
