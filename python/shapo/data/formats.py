"""Preference pairs and prompts from rows: which published schema they are of, what is used and what is left out.

Preference schemas are PKU-SafeRLHF, hh-rlhf and the forms that TRL takes; prompt schemas are Do-Not-Answer, HarmBench
and SALAD-Bench. A row that cannot be used is counted under its reason, never dropped in silence; duplicate prompts
stay. Reading files is for `sources`, one row for `schemas`, tokens for `tokens`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from shapo.checked import checked
from shapo.data.pairs import (
    ASSISTANT_MARKER,
    EvaluationPrompt,
    PairSet,
    PreferencePair,
    PromptSet,
    is_transcript,
    render_transcript,
)
from shapo.data.schemas import (
    PAIR_READERS,
    PREFERENCES,
    UnusableRow,
    is_missing,
    read_messages,
    read_pair,
    require_unicode,
)
from shapo.data.sources import Row, read_rows
from shapo.errors import UserError

__all__ = ["PROMPT_FORMATS", "load_pairs", "load_prompts"]

Source = str | os.PathLike[str] | Iterable[Row]


_SEEN_FIRST = 100  # rows that the format is told by; one of them may be broken


@checked
def load_pairs(
    source: Source,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    preference: str = "safer",
    stream: bool = False,
) -> PairSet:
    """Read preference pairs.

    Args:
        source: a local file or folder, a hub name or rows; see `sources.read_rows`.
        format: "pku", "hh" or "trl"; "auto" decides by the first rows.
        split: of a folder or a hub data set.
        limit: stop after this many pairs.
        preference: for PKU-SafeRLHF, whether "safer" (`safer_response_id`) or "better" (`better_response_id`, the more
            helpful) is the chosen one; other formats have one preference only and refuse "better".
        stream: read a hub data set row by row, so that with a `limit` little is downloaded.

    Returns:
        The pairs in file order, with a count of unused rows by reason.

    Raises:
        UserError: unreadable source, columns of no known format, no usable pair, or a bad argument.
    """
    if preference not in PREFERENCES:
        raise UserError(f"preference is {preference!r}; expected one of {', '.join(PREFERENCES)}")
    rows, name, chosen = _open(source, split, format, PAIR_READERS, _detect_pairs, limit, stream)
    if preference != "safer" and chosen != "pku":
        raise UserError(f"preference={preference!r} is for the format pku; {name} is of the format {chosen}")
    pairs: list[PreferencePair] = []
    dropped, messages = Counter[str](), False
    for row in rows:
        if limit is not None and len(pairs) == limit:
            break
        try:
            pairs.append(read_pair(row, chosen, preference))
        except UnusableRow as reason:
            dropped[str(reason)] += 1
        else:
            messages = messages or isinstance(row.get("chosen"), (list, tuple))
    result = PairSet(pairs, dict(dropped), name, chosen, messages)
    if not pairs:
        raise UserError(f"no usable pair: {result.summary()}")
    return result


@checked
def load_prompts(
    source: Source, *, format: str = "auto", split: str | None = None, limit: int | None = None
) -> PromptSet:
    """Read prompts to answer, each rendered as a transcript of one question.

    Args:
        source: as for `load_pairs`.
        format: "do-not-answer", "harmbench", "salad-bench" or "prompt" (any file with a `prompt` column and perhaps a
            `category`); "auto" decides by the first rows.
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
        try:
            prompts.append(_read_prompt(row, schema, str(number)))
        except UnusableRow as reason:
            dropped[str(reason)] += 1
    result = PromptSet(prompts, dict(dropped), name, chosen)
    if not prompts:
        raise UserError(f"no usable prompt: {result.summary()}")
    return result


def _read_prompt(row: Row, schema: _PromptSchema, number: str) -> EvaluationPrompt:
    question, context = _first(row, schema.prompt), _first(row, schema.context)
    if is_missing(question) or (isinstance(question, str) and not question.strip()):
        raise UnusableRow("with an empty prompt")
    if isinstance(question, (list, tuple)):
        messages = read_messages(question)
        if not messages or messages[-1]["role"] != "user":
            raise UnusableRow("whose last turn is not the user's")
    elif isinstance(question, str):
        # HarmBench's own way to join the two for its contextual behaviours.
        text = question if is_missing(context) else f"{context}\n\n---\n\n{question}"
        messages = [{"role": "user", "content": text}]
    else:
        raise UnusableRow("with a prompt that is neither text nor messages")
    prompt = question if isinstance(question, str) and is_transcript(question) else render_transcript(messages)
    category, identifier = _first(row, schema.category), _first(row, schema.identifier)
    read = EvaluationPrompt(
        prompt, "" if is_missing(category) else str(category), number if is_missing(identifier) else str(identifier)
    )
    require_unicode(read.prompt, read.category, read.identifier)
    return read


def _open(
    source: Source,
    split: str | None,
    format: str,
    formats: Mapping[str, object],
    detect: Callable[[Sequence[Row], str], str],
    limit: int | None,
    stream: bool = False,
) -> tuple[Iterator[Row], str, str]:
    if format != "auto" and format not in formats:
        raise UserError(f"format is {format!r}; expected auto or one of {', '.join(formats)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1")
    rows, name = read_rows(source, split, stream=stream)
    first = list(islice(rows, _SEEN_FIRST if limit is None else min(limit, _SEEN_FIRST)))
    if not first:
        raise UserError(f"{name} is empty; expected at least one row")
    detected = detect(first, name) if format == "auto" else format
    if not any(_fits(row, detected) for row in first):
        raise UserError(f"{name}: not of the format {detected}; {_columns(first)}; expected {_expected(detected)}")
    return chain(first, rows), name, detected


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


def _fits(row: Row, format: str) -> bool:
    return all(any(column in row for column in either) for either in _REQUIRED[format])


def _expected(format: str) -> str:
    return ", ".join(" or ".join(either) for either in _REQUIRED[format])


def _columns(rows: Sequence[Row]) -> str:
    return f"found the columns {', '.join(map(str, rows[0])) or '(none)'}"


def _detect_pairs(rows: Sequence[Row], name: str) -> str:
    if any(_fits(row, "pku") for row in rows):
        return "pku"
    answers = [row for row in rows if _fits(row, "hh")]
    if answers:
        transcripts = sum(_is_pair_of_transcripts(row) for row in answers)
        return "hh" if 2 * transcripts > len(answers) else "trl"
    raise UserError(f"{name}: no known preference format; {_columns(rows)}; expected {_any_of(PAIR_READERS)}")


def _is_pair_of_transcripts(row: Row) -> bool:
    return is_missing(row.get("prompt")) and all(
        isinstance(row[side], str) and ASSISTANT_MARKER in row[side] for side in ("chosen", "rejected")
    )


def _detect_prompts(rows: Sequence[Row], name: str) -> str:
    for format in PROMPT_FORMATS:
        if any(_fits(row, format) for row in rows):
            return format
    raise UserError(f"{name}: no known prompt format; {_columns(rows)}; expected {_any_of(PROMPT_FORMATS)}")


def _any_of(formats: Iterable[str]) -> str:
    return "; or ".join(f"{format}: {_expected(format)}" for format in formats)


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


def _first(row: Row, columns: tuple[str, ...]) -> object:
    """The first of `columns` that the row fills."""
    return next((row[column] for column in columns if not is_missing(row.get(column))), None)
