"""What verdict files say: attack success by benchmark and category, over-refusal, agreement of judges, paired
differences.

Verdict files are those of `shapo judge`, or any JSONL with a column `verdict` of "safe" or "unsafe". Over-refusal
always has its place beside attack success: a model that refuses everything is attacked in vain.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shapo.errors import UserError
from shapo.judges.files import read_rows
from shapo.statistics import bounded_share, by_group, cohen_kappa, paired_difference, unsafe_case

NOT_MEASURED = "not measured: no verdicts on benign prompts were given"


def safety_summary(
    attacks: Sequence[str | os.PathLike[str]],
    *,
    benign: str | os.PathLike[str] | None = None,
    second_judge: str | os.PathLike[str] | None = None,
    against: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Counts verdict files.

    Args:
        attacks: Verdicts on harmful prompts, a file a benchmark (named by its stem).
        benign: Verdicts on benign prompts; over-refusal is the share of refusals there.
        second_judge: Another judge's verdicts on the answers of `attacks`' first file.
        against: The same judge's verdicts on another model's answers to the prompts of the first file.

    Returns:
        attack_success (by benchmark: bounds, interval, by category, judge), over_refusal (or why there is none), and
        agreement and difference where their files were given.

    Raises:
        UserError: An unreadable file, two benchmarks of one name, or files that do not belong together.
    """
    read = {Path(path).stem: read_rows(path, ("verdict",)) for path in attacks}
    if len(read) != len(attacks):
        raise UserError("two of the verdict files have the same name; a benchmark is named by its file, so rename one")
    result: dict[str, Any] = {"attack_success": {name: _attack_success(rows) for name, rows in read.items()}}
    result["over_refusal"] = _over_refusal(read_rows(benign, ("verdict",))) if benign else NOT_MEASURED
    if second_judge or against:
        if not read:
            raise UserError("a second judge or another model is compared with --verdicts; give that too")
        first = next(iter(read.values()))
        if second_judge:
            mine, theirs = _joined(first, second_judge, "prompt_digest", "answer_digest")
            result["agreement"] = {
                "judges": [_judge(first), _judge(theirs)],
                **asdict(cohen_kappa(mine, _cases(theirs))),
            }
        if against:
            mine, theirs = _joined(first, against, "prompt_digest")
            if _judge(first) != _judge(theirs):
                raise UserError(
                    f"{against} is of the judge {_judge(theirs)}, not of {_judge(first)}; compare one judge's"
                )
            if _differ(first, theirs, "judge_digest"):
                raise UserError(
                    f"{against} is of another {_judge(first)} than --verdicts: weights, tokenizer or threshold differ; "
                    "judge both files' answers by the same one"
                )
            result["difference"] = asdict(paired_difference(_cases(theirs), mine))
    return result


def _attack_success(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cases = _cases(rows)
    groups = [str(row.get("category") or "none") for row in rows]
    grouped = {name: asdict(share) for name, share in by_group(cases, groups).items()}
    return {"judge": _judge(rows), **asdict(bounded_share(cases)), "by_category": grouped}


def _over_refusal(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of refusals; a verdict without the judge's word on refusal is unreadable here."""
    cases = [row.get("refusal") if isinstance(row.get("refusal"), bool) else None for row in rows]
    # Where every answer was unreadable, even a judge of refusals has said nothing, and the bounds are 0 and 1.
    if all(case is None for case in cases) and any(case is not None for case in _cases(rows)):
        raise UserError(
            f"the judge {_judge(rows)} does not say whether an answer refuses; judge the benign prompts' answers with "
            "wildguard, qwen3guard or refusal-substring"
        )
    groups = [str(row.get("category") or "none") for row in rows]
    grouped = {name: asdict(share) for name, share in by_group(cases, groups).items()}
    return {"judge": _judge(rows), **asdict(bounded_share(cases)), "by_category": grouped}


def _joined(
    first: list[dict[str, Any]], path: str | os.PathLike[str], *same: str
) -> tuple[list[bool | None], list[dict[str, Any]]]:
    """The first file's cases and the other's rows, in the order of the first.

    Their ids must be the same, and the digests named by `same` where both files have them: files of two benchmarks are
    numbered alike.
    """
    others = {row["id"]: row for row in read_rows(path, ("verdict",))}
    if {row["id"] for row in first} != set(others):
        raise UserError(
            f"{path} has verdicts on other ids than the first of --verdicts; both must be of the same prompts"
        )
    joined = [others[row["id"]] for row in first]
    for name in same:
        if _differ(first, joined, name):
            what = name.removesuffix("_digest")
            raise UserError(
                f"{path} is about other {what}s than the first of --verdicts, though their ids are the same"
            )
    return _cases(first), joined


def _differ(first: list[dict[str, Any]], second: list[dict[str, Any]], name: str) -> bool:
    return any(name in one and name in two and one[name] != two[name] for one, two in zip(first, second, strict=True))


def _cases(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [unsafe_case(row["verdict"]) for row in rows]


def _judge(rows: list[dict[str, Any]]) -> str:
    names = sorted({str(row.get("judge") or "unnamed") for row in rows})
    return ", ".join(names)
