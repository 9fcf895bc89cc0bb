"""What one row of a published preference set means: the readers that turn a row of each schema into a pair.

A row that gives no pair raises `UnusableRow`, whose message is the reason under which it is counted; nothing that a row
may hold raises anything else. Files are for `sources`, whole sets for `formats`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shapo.data.chat import common_length
from shapo.data.pairs import (
    ASSISTANT_MARKER,
    ROLES,
    PreferencePair,
    render_response,
    render_transcript,
)
from shapo.data.sources import Row

__all__ = ["PAIR_READERS", "PREFERENCES", "UnusableRow", "is_missing", "read_messages", "read_pair", "require_unicode"]


class UnusableRow(Exception):
    """A row that gives no pair; its message is the reason under which it is counted."""


PREFERENCES = {"safer": "safer_response_id", "better": "better_response_id"}
"""For PKU-SafeRLHF: what the chosen response is, and the column that names it."""


def read_pair(row: Row, format: str, preference: str) -> PreferencePair:
    """The pair of one row.

    Raises:
        UnusableRow: it gives none.
    """
    pair = PAIR_READERS[format](row, preference)
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise UnusableRow("with an empty response")
    require_unicode(pair.prompt, pair.chosen, pair.rejected, pair.category)
    if pair.chosen.strip() == pair.rejected.strip():
        raise UnusableRow("with equal responses")
    return pair


def is_missing(value: object) -> bool:
    """Whether a cell is empty: null, an empty text, or NaN, which tables write for both."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def require_unicode(*texts: str) -> None:
    """Raises UnusableRow for what UTF-8 cannot write: JSON's escapes can give halves of characters."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise UnusableRow("with half of a surrogate pair, which is no character") from None


def _read_pku(row: Row, preference: str) -> PreferencePair:
    """One PKU-SafeRLHF row, old schema or new: `is_response_*_safe` and harm categories are used where present."""
    column = PREFERENCES[preference]
    chosen = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(str(row.get(column)))
    if chosen is None:
        raise UnusableRow(f"without a {column}")
    sides = (chosen, 1 - chosen)
    safe = [_flag(row.get(f"is_response_{side}_safe")) for side in sides]
    # The harm is the rejected response's where it has one: that is what the preference is about.
    categories = [_first_category(row.get(f"response_{side}_harm_category")) for side in reversed(sides)]
    return PreferencePair(
        prompt=render_transcript([{"role": "user", "content": _text(row, "prompt")}]),
        chosen=render_response(_text(row, f"response_{sides[0]}")),
        rejected=render_response(_text(row, f"response_{sides[1]}")),
        category=next(filter(None, categories), "") or _label(row.get("category")),
        chosen_unsafe=None if safe[0] is None else not safe[0],
        rejected_unsafe=None if safe[1] is None else not safe[1],
    )


def _flag(value: object) -> bool | None:
    """Yes or no as JSON, CSV and tables of numbers write it; None where there is nothing."""
    if is_missing(value):
        return None
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    try:
        return known[str(value).strip().lower()]
    except KeyError:
        raise UnusableRow("with a safety flag that is neither true nor false") from None


def _first_category(harms: object) -> str:
    """The first harm that applies, of `{category: applies}` or of a list; a CSV file holds either as its text."""
    if isinstance(harms, str):
        harms = _written(harms)
    if isinstance(harms, Mapping):
        return next((str(name) for name, applies in harms.items() if not is_missing(applies) and applies), "")
    return next((_label(harm) for harm in harms), "") if isinstance(harms, (list, tuple)) else ""


def _written(text: str) -> object:
    """The value of a JSON or Python literal, else the text."""
    for read in (json.loads, ast.literal_eval):
        try:
            value: object = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return value
    return text


def _read_hh(row: Row, preference: str) -> PreferencePair:
    """One hh-rlhf row: the prompt is everything up to and including the last assistant marker, in both transcripts."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    ends = [text.rfind(ASSISTANT_MARKER) for text in (chosen, rejected)]
    if min(ends) < 0:
        raise UnusableRow("without an assistant turn")
    prompt, other = (text[: end + len(ASSISTANT_MARKER)] for text, end in zip((chosen, rejected), ends, strict=True))
    if prompt != other:
        raise UnusableRow("whose transcripts differ before the last answer")
    # hh-rlhf has no safety labels: for the probe the rejected answer counts as the unsafe one.
    return PreferencePair(
        prompt, chosen[len(prompt) :], rejected[len(prompt) :], chosen_unsafe=False, rejected_unsafe=True
    )


def _read_trl(row: Row, preference: str) -> PreferencePair:
    """One row in a form that TRL takes: text or messages, with the prompt in a column or as the shared beginning."""
    prompt, chosen, rejected = (row.get(column) for column in ("prompt", "chosen", "rejected"))
    if is_missing(chosen) or is_missing(rejected):
        raise UnusableRow("with an empty response")
    category = _label(row.get("category"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            # A transcript is no answer, so one that stands before both answers is the prompt once more.
            if prompt.endswith(ASSISTANT_MARKER) and chosen.startswith(prompt) and rejected.startswith(prompt):
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        elif is_missing(prompt):
            prompt, chosen, rejected = _split_text(chosen, rejected)
        else:
            prompt = render_transcript(read_messages(prompt))
            chosen, rejected = render_response(chosen), render_response(rejected)
        return PreferencePair(prompt, chosen, rejected, category)
    if any(not is_missing(row.get(column)) and row[column] for column in _BESIDE_MESSAGES):
        raise UnusableRow("with tools, images or template arguments beside the messages")
    turns, answers = _split_messages(read_messages(chosen), read_messages(rejected))
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_messages(prompt or [])
    spoken, asked = _without_system(turns), _without_system(given)
    if spoken[: len(asked)] == asked:  # the answers repeat the prompt's turns
        turns = [turn for turn in given if turn["role"] == "system" and turn not in turns] + turns
    else:
        turns = given + turns
    if not turns:
        raise UnusableRow("without a prompt")
    return PreferencePair(render_transcript(turns), render_response(answers[0]), render_response(answers[1]), category)


def _without_system(turns: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    return [turn for turn in turns if turn["role"] != "system"]


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The shared beginning up to its last whole word, and the two rests, which begin with the white space behind it."""
    end = common_length(chosen, rejected)
    if not (chosen[end : end + 1].isspace() and rejected[end : end + 1].isspace()):
        last_space = re.search(r"\s+\S*$", chosen[:end])
        end = last_space.start() if last_space else 0
    if not chosen[:end].strip():
        raise UnusableRow("without a shared beginning")
    return chosen[:end], chosen[end:], rejected[end:]


def _split_messages(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> tuple[list[dict[str, str]], tuple[str, str]]:
    """The shared turns before the last, and the two answers."""
    if not chosen or not rejected:
        raise UnusableRow("with an empty response")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRow("whose transcripts differ before the last answer")
    if not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise UnusableRow("whose last turn is not the assistant's")
    return chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])


# What a message or a row may hold beside text and a transcript cannot. Left out, it would be trained on half.
_BESIDE_TEXT = ("tool_calls", "function_call", "tool_call_id", "reasoning", "reasoning_content", "thinking", "audio")
_BESIDE_MESSAGES = ("tools", "functions", "image", "images", "videos", "audio", "documents", "chat_template_kwargs")


def read_messages(value: object) -> list[dict[str, str]]:
    """Messages as plain role and text; content in parts is joined where it is text.

    Raises:
        UnusableRow: another role, content that is not text, tool calls or reasoning, no messages at all.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        raise UnusableRow("with what is neither text nor messages")
    messages = []
    for message in value:
        if message.get("role") not in ROLES:
            raise UnusableRow(f"with a role other than {', '.join(ROLES)}")
        if any(not is_missing(message.get(key)) and message[key] for key in _BESIDE_TEXT):
            raise UnusableRow("with tool calls or reasoning beside the text")
        messages.append({"role": message["role"], "content": _content(message.get("content"))})
    return messages


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else [None]
    texts: list[Any] = [
        part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableRow("with content that is not text")
    return "".join(texts)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if is_missing(value):
        raise UnusableRow("with an empty response" if column != "prompt" else "without a prompt")
    if not isinstance(value, str):
        raise UnusableRow(f"whose {column} is not text")
    return value


def _label(value: object) -> str:
    return "" if is_missing(value) else str(value)


PAIR_READERS: dict[str, Callable[[Row, str], PreferencePair]] = {"pku": _read_pku, "hh": _read_hh, "trl": _read_trl}
"""Name of a preference format -> the function that turns one row into a pair."""
