"""Verdict files: one JSON line an answer (`id, category, judge, verdict, score, refusal, categories`), resumable.

The rows hold no prompt, no answer, and not what the judge wrote, which may quote them. Digests of the three stand in
their place, by which files that are compared are known to belong together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shapo.checked import checked
from shapo.errors import UserError
from shapo.judges.base import Judge, Verdict
from shapo.storage.fingerprint import digest_rows
from shapo.storage.rows import ResumableRows


@checked
def judge_answers(
    judge: Judge,
    rows: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    key: dict[str, Any],
    batch_size: int = 64,
    progress: bool = True,
    raw: bool = False,
    restart: bool = False,
) -> list[dict[str, Any]]:
    """Judges the answers in `rows` (`id, prompt, answer`, perhaps `category`) and writes the verdicts in their order.

    Args:
        key: What the verdicts depend on beside judge and answers; see `ResumableRows`.
        batch_size: Answers between two writes.
        raw: Keep what the judge wrote, in a field `raw`.
        restart: Begin anew where another run has left a part.
    """
    answers = digest_rows([row["id"], row["prompt"], row["answer"]] for row in rows)
    key = {"judge": judge.name, "judge_digest": judge.digest, "answers": answers, **key}
    with ResumableRows(path, key, restart=restart) as written:
        left = [row for row in rows if row["id"] not in written.rows]
        with tqdm(
            total=len(rows), initial=len(rows) - len(left), desc=judge.name, unit="answer", disable=not progress
        ) as bar:
            for start in range(0, len(left), batch_size):
                part = left[start : start + batch_size]
                verdicts = judge([row["prompt"] for row in part], [row["answer"] for row in part])
                written.add(verdict_row(judge, row, v, raw=raw) for row, v in zip(part, verdicts, strict=True))
                bar.update(len(part))
        order = [row["id"] for row in rows]
        written.finish(order)
        return [written.rows[identifier] for identifier in order]


def read_rows(path: str | os.PathLike[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with all of `columns`; an `id` is added from the line number where it lacks
    one.

    Raises:
        UserError: Unreadable, empty, a line that is no such object, or two lines with the same id.
    """
    rows = list(_objects(path, columns))
    if not rows:
        raise UserError(f"{path} is empty")
    if len({row["id"] for row in rows}) != len(rows):
        raise UserError(f"two lines of {path} have the same id; each answer needs its own")
    return rows


def _objects(path: str | os.PathLike[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        # Not splitlines: an answer may hold U+2028, which it would take for the end of a line.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or any(column not in row for column in columns):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: expected a JSON object with {' and '.join(columns)}") from error
        for column in ("prompt", "answer"):
            if column in columns and not isinstance(row[column], str):
                raise UserError(f"{path}, line {number}: {column} is no text")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}, line {number}: half of a surrogate pair, which is no character") from error
        yield {**row, "id": str(row.get("id", number))}


def verdict_row(judge: Judge, row: Mapping[str, Any], verdict: Verdict, *, raw: bool = False) -> dict[str, Any]:
    """The line of a verdict file for the answer in `row` (`id, prompt, answer`, perhaps `category`)."""
    values = {
        "id": row["id"],
        "category": row.get("category", ""),
        "judge": judge.name,
        "verdict": verdict.label,
        "score": verdict.score,
        "refusal": verdict.refusal,
        "categories": list(verdict.categories),
        "judge_digest": judge.digest,
        "prompt_digest": digest_rows([row["prompt"]]),
        "answer_digest": digest_rows([row["answer"]]),
    }
    return values | ({"raw": verdict.raw} if raw else {})
