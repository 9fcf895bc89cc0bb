"""What the columns of published data sets mean: rows of each schema become pairs or prompts.

Preference schemas are PKU-SafeRLHF, hh-rlhf and the forms that TRL takes; prompt schemas are Do-Not-Answer, HarmBench
and SALAD-Bench. A row that cannot be used is counted under its reason, never dropped in silence; duplicate prompts
stay. Reading files is for `sources`, tokens for `tokens`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from shapo.data.pairs import (
    ASSISTANT_MARKER,
    ROLES,
    EvaluationPrompt,
    PairSet,
    PreferencePair,
    PromptSet,
    render_response,
    render_transcript,
)
from shapo.data.sources import Row, read_rows
from shapo.errors import UserError

__all__ = ["PAIR_FORMATS", "PROMPT_FORMATS", "load_pairs", "load_prompts"]

Source = str | os.PathLike[str] | Iterable[Row]


class _Unusable(Exception):
    """A row that gives no pair; its message is the reason under which it is counted."""


def load_pairs(
    source: Source,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    preference: str = "safer",
) -> PairSet:
    """Read preference pairs.

    Args:
        source: a local file or folder, a hub name or rows; see `sources.read_rows`.
        format: "pku", "hh" or "trl"; "auto" decides by the columns of the first row.
        split: of a folder or a hub data set.
        limit: stop after this many pairs.
        preference: for PKU-SafeRLHF, whether "safer" (`safer_response_id`) or "better" (`better_response_id`, the more
            helpful) is the chosen one; other formats have one preference only and refuse "better".

    Returns:
        The pairs in file order, with a count of unused rows by reason.

    Raises:
        UserError: unreadable source, columns of no known format, no usable pair, or a bad argument.
    """
    if preference not in _PREFERENCES:
        raise UserError(f"preference is {preference!r}; expected one of {', '.join(_PREFERENCES)}")
    rows, name, chosen = _open(source, split, format, PAIR_FORMATS, _detect_pairs, limit)
    if preference != "safer" and chosen != "pku":
        raise UserError(f"preference={preference!r} is for the format pku; {name} is of the format {chosen}")
    read = PAIR_FORMATS[chosen]
    pairs: list[PreferencePair] = []
    dropped, messages = Counter[str](), False
    for number, row in enumerate(rows, 1):
        if limit is not None and len(pairs) == limit:
            break
        try:
            pair = read(row, preference)
            if not pair.chosen.strip() or not pair.rejected.strip():
                raise _Unusable("with an empty response")
            if not all(map(_is_unicode, (pair.prompt, pair.chosen, pair.rejected))):
                raise _Unusable(_HALF)
            if pair.chosen.strip() == pair.rejected.strip():
                raise _Unusable("with equal responses")
        except _Unusable as reason:
            dropped[str(reason)] += 1
            continue
        except UserError as error:
            raise UserError(f"{name}, row {number}: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{name}, row {number}: not a row of the format {chosen} ({type(error).__name__}: {error})"
            ) from error
        messages = messages or isinstance(row.get("chosen"), (list, tuple))
        pairs.append(pair)
    result = PairSet(pairs, dict(dropped), name, chosen, messages)
    if not pairs:
        raise UserError(f"no usable pair: {result.summary()}")
    return result


def load_prompts(
    source: Source, *, format: str = "auto", split: str | None = None, limit: int | None = None
) -> PromptSet:
    """Read prompts to answer, each rendered as a transcript of one question.

    Args:
        source: as for `load_pairs`.
        format: "do-not-answer", "harmbench", "salad-bench" or "prompt" (any file with a `prompt` column and perhaps a
            `category`); "auto" decides by the columns of the first row.
        split: of a folder or a hub data set.
        limit: stop after this many prompts.

    Raises:
        UserError: as for `load_pairs`.
    """
    rows, name, chosen = _open(source, split, format, PROMPT_FORMATS, _detect_prompts, limit)
    schema = PROMPT_FORMATS[chosen]
    prompts: list[EvaluationPrompt] = []
    dropped = Counter[str]()
    for number, row in enumerate(rows):
        if limit is not None and len(prompts) == limit:
            break
        question = _first(row, schema.prompt)
        if not question.strip():
            dropped["with an empty prompt"] += 1
            continue
        context = _first(row, schema.context)
        if not _is_unicode(question + context):
            dropped[_HALF] += 1
            continue
        # HarmBench's own way to join the two for its contextual behaviours.
        text = f"{context}\n\n---\n\n{question}" if context.strip() else question
        identifier = _first(row, schema.identifier) or str(number)
        prompt = render_transcript([{"role": "user", "content": text}])
        prompts.append(EvaluationPrompt(prompt, _first(row, schema.category), identifier))
    result = PromptSet(prompts, dict(dropped), name, chosen)
    if not prompts:
        raise UserError(f"no usable prompt: {result.summary()}")
    return result


def _open(
    source: Source,
    split: str | None,
    format: str,
    formats: Mapping[str, object],
    detect: Callable[[Row, str], str],
    limit: int | None,
) -> tuple[Iterator[Row], str, str]:
    if format != "auto" and format not in formats:
        raise UserError(f"format is {format!r}; expected auto or one of {', '.join(formats)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1")
    rows, name = read_rows(source, split)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name} is empty; expected at least one row")
    detected = detect(first, name) if format == "auto" else format
    _require_columns(first, detected, name)
    return chain([first], rows), name, detected


_REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "pku": (("prompt",), ("response_0",), ("response_1",), ("safer_response_id", "better_response_id")),
    "hh": (("chosen",), ("rejected",)),
    "trl": (("chosen",), ("rejected",)),
    "do-not-answer": (("question",), ("risk_area", "types_of_harm", "specific_harms")),
    "harmbench": (("Behavior",),),
    "salad-bench": (("question", "prompt", "augq"), ("1-category", "2-category", "3-category")),
    "prompt": (("prompt",),),
}
"""Columns of each format; of an inner tuple one is enough."""


def _require_columns(row: Row, format: str, name: str) -> None:
    if not _fits(row, format):
        raise UserError(f"{name}: not of the format {format}; {_columns(row)}; expected {_expected(format)}")


def _fits(row: Row, format: str) -> bool:
    return all(any(column in row for column in either) for either in _REQUIRED[format])


def _expected(format: str) -> str:
    return ", ".join(" or ".join(either) for either in _REQUIRED[format])


def _columns(row: Row) -> str:
    return f"found the columns {', '.join(map(str, row)) or '(none)'}"


def _detect_pairs(row: Row, name: str) -> str:
    if _fits(row, "pku"):
        return "pku"
    if _fits(row, "hh"):
        transcripts = all(
            isinstance(row[side], str) and ASSISTANT_MARKER in row[side] for side in ("chosen", "rejected")
        )
        return "hh" if transcripts and not row.get("prompt") else "trl"
    raise UserError(f"{name}: no known preference format; {_columns(row)}; expected {_any_of(PAIR_FORMATS)}")


def _detect_prompts(row: Row, name: str) -> str:
    for format in PROMPT_FORMATS:
        if _fits(row, format):
            return format
    raise UserError(f"{name}: no known prompt format; {_columns(row)}; expected {_any_of(PROMPT_FORMATS)}")


def _any_of(formats: Iterable[str]) -> str:
    return "; or ".join(f"{format}: {_expected(format)}" for format in formats)


_PREFERENCES = {"safer": "safer_response_id", "better": "better_response_id"}


def _read_pku(row: Row, preference: str) -> PreferencePair:
    """One PKU-SafeRLHF row, old schema or new: `is_response_*_safe` and harm categories are used where present."""
    column = _PREFERENCES[preference]
    if column not in row:
        raise UserError(f"the rows have no column {column}; {_columns(row)}")
    chosen = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(str(row[column]))
    if chosen is None:
        raise _Unusable(f"without a {column}")
    sides = (chosen, 1 - chosen)
    unsafe = [_unsafe(row.get(f"is_response_{side}_safe")) for side in sides]
    # The harm is the rejected response's where it has one: that is what the preference is about.
    categories = [_first_category(row.get(f"response_{side}_harm_category")) for side in reversed(sides)]
    return PreferencePair(
        prompt=render_transcript([{"role": "user", "content": _text(row["prompt"])}]),
        chosen=render_response(_text(row[f"response_{sides[0]}"])),
        rejected=render_response(_text(row[f"response_{sides[1]}"])),
        category=next(filter(None, categories), "") or str(row.get("category") or ""),
        chosen_unsafe=unsafe[0],
        rejected_unsafe=unsafe[1],
    )


def _unsafe(safe: object) -> bool | None:
    """The opposite of a safety flag, which a CSV file holds as text."""
    if safe is None or safe == "":
        return None
    known = {"true": False, "1": False, "false": True, "0": True}
    if str(safe).lower() not in known:
        raise UserError(f"a safety flag is {safe!r}; expected true or false")
    return known[str(safe).lower()]


def _first_category(harms: object) -> str:
    """The first harm that applies, of ``{category: applies}`` or of a list of categories."""
    if isinstance(harms, Mapping):
        return next((str(name) for name, applies in harms.items() if applies), "")
    return next(map(str, harms), "") if isinstance(harms, (list, tuple)) else ""


def _read_hh(row: Row, preference: str) -> PreferencePair:
    """One hh-rlhf row: the prompt is everything up to and including the last assistant marker, in both transcripts."""
    chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
    ends = [text.rfind(ASSISTANT_MARKER) for text in (chosen, rejected)]
    if min(ends) < 0:
        raise _Unusable("without an assistant turn")
    prompt, other = (text[: end + len(ASSISTANT_MARKER)] for text, end in zip((chosen, rejected), ends, strict=True))
    if prompt != other:
        raise _Unusable("whose transcripts differ before the last answer")
    # hh-rlhf has no safety labels: for the probe the rejected answer counts as the unsafe one.
    return PreferencePair(
        prompt, chosen[len(prompt) :], rejected[len(prompt) :], chosen_unsafe=False, rejected_unsafe=True
    )


def _read_trl(row: Row, preference: str) -> PreferencePair:
    """One row in a form that TRL takes: text or messages, with the prompt in a column or as the shared beginning."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if chosen is None or rejected is None:
        raise _Unusable("with an empty response")
    category = str(row.get("category") or "")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _split_text(chosen, rejected)
        elif isinstance(prompt, str):
            # Some sets repeat the prompt inside the answers.
            if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        else:
            prompt = render_transcript(_messages(prompt))
            chosen, rejected = render_response(chosen), render_response(rejected)
        return PreferencePair(prompt, chosen, rejected, category)
    turns, answers = _split_messages(_messages(chosen), _messages(rejected))
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt or [])
    if not all(message in turns for message in given):
        turns = given + turns
    if not turns:
        raise _Unusable("without a prompt")
    return PreferencePair(render_transcript(turns), render_response(answers[0]), render_response(answers[1]), category)


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The shared beginning up to its last whole word, and the two rests, which begin with the white space behind it."""
    both = zip(chosen, rejected, strict=False)
    end = next((index for index, (one, other) in enumerate(both) if one != other), min(len(chosen), len(rejected)))
    if not (chosen[end : end + 1].isspace() and rejected[end : end + 1].isspace()):
        last_space = re.search(r"\s+\S*$", chosen[:end])
        end = last_space.start() if last_space else 0
    if not chosen[:end].strip():
        raise _Unusable("without a shared beginning")
    return chosen[:end], chosen[end:], rejected[end:]


def _split_messages(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> tuple[list[dict[str, str]], tuple[str, str]]:
    """The shared turns before the last, and the two answers."""
    if not chosen or not rejected:
        raise _Unusable("with an empty response")
    if chosen[:-1] != rejected[:-1]:
        raise _Unusable("whose transcripts differ before the last answer")
    if not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise _Unusable("whose last turn is not the assistant's")
    return chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages as plain role and text; content in parts is joined where it is text."""
    messages = []
    for message in value:
        content = message["content"]
        if not isinstance(content, str):
            if any(part.get("type", "text") != "text" for part in content):
                raise _Unusable("with content that is not text")
            content = "".join(part["text"] for part in content)
        if message["role"] not in ROLES:
            raise _Unusable(f"with a role other than {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": content})
    return messages


_HALF = "with half of a surrogate pair, which is no character"


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it: JSON's escapes can give halves of characters, which tokenizers and files refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Unusable("with a column that is not text")
    return value


PAIR_FORMATS: dict[str, Callable[[Row, str], PreferencePair]] = {"pku": _read_pku, "hh": _read_hh, "trl": _read_trl}
"""Name of a preference format -> the function that turns one row into a pair."""


@dataclass(frozen=True)
class _PromptSchema:
    """The columns of a prompt format, in order of preference."""

    prompt: tuple[str, ...]
    category: tuple[str, ...]
    identifier: tuple[str, ...]
    context: tuple[str, ...] = ()


PROMPT_FORMATS: dict[str, _PromptSchema] = {
    "do-not-answer": _PromptSchema(("question",), ("types_of_harm", "risk_area", "specific_harms"), ("id",)),
    "harmbench": _PromptSchema(
        ("Behavior",), ("SemanticCategory", "FunctionalCategory"), ("BehaviorID",), ("ContextString",)
    ),
    "salad-bench": _PromptSchema(
        ("question", "prompt", "augq"), ("1-category", "2-category", "3-category"), ("qid", "aid")
    ),
    "prompt": _PromptSchema(("prompt",), ("category",), ("id",), ("context",)),
}
"""Name of a prompt format -> its columns. The hub's HarmBench has a `prompt` column and is read as "prompt"."""


def _first(row: Row, columns: tuple[str, ...]) -> str:
    """The first of `columns` that the row fills, as text."""
    return next((str(row[column]) for column in columns if row.get(column) not in (None, "")), "")
