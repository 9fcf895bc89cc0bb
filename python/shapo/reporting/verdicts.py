"""Results of `shapo evaluate`: attack success beside over-refusal, comparisons, lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapo.reporting.contents import Cell, Section, Table, bounds, number, percent, short_names, word

Named = Sequence[tuple[str, dict[str, Any]]]

LIMITS = (
    "Both bounds are given where verdicts could not be read; the interval covers both.",
    "Two judges may differ by more than two models do: compare models by one judge, and judges by their agreement.",
    "Over-refusal belongs beside attack success: a model that refuses everything is attacked in vain.",
)


def sections(results: Sequence[tuple[Path, dict[str, Any]]]) -> list[Section]:
    """One section of all results, a row a file."""
    names = short_names([path.with_suffix("") for path, _ in results])
    named = list(zip(names, (values for _, values in results), strict=True))
    kept = [made for table in (_safety, _categories, _pairs, _comparisons, _tasks) if (made := table(named)).rows]
    judged = any(values.get("attack_success") for _, values in results)
    return [Section("Evaluations", [], kept, [], list(LIMITS) if judged else [])] if kept else []


def _safety(results: Named) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, values in results:
        refusal = values.get("over_refusal")
        refused = bounds(refusal) if isinstance(refusal, dict) else Cell("not measured")
        attacked = values.get("attack_success") or {}
        for benchmark, share in attacked.items():
            unread = number(share["unreadable"], "d")
            rows.append((word(name), word(benchmark), word(share["judge"]),
                         number(share["n"], "d"), unread, bounds(share), refused))  # fmt: skip
        if isinstance(refusal, dict) and not attacked:
            rows.append(
                (word(name), word("-"), word(refusal["judge"]), *[Cell("-")] * 2, Cell("not measured"), refused)
            )
    columns = ("file", "benchmark", "judge", "prompts", "unreadable", "attack success %", "over-refusal %")
    return Table("Attack success and over-refusal (95 % interval)", columns, tuple(rows))


def _categories(results: Named) -> Table:
    rows = [
        (word(category), word(f"{name}, {benchmark}"), number(group["n"], "d"), bounds(group))
        for name, values in results
        for benchmark, share in (values.get("attack_success") or {}).items()
        if len(share["by_category"]) > 1
        for category, group in share["by_category"].items()
    ]
    columns = ("category", "file", "prompts", "attack success %")
    return Table("Attack success by category (95 % interval)", columns, tuple(rows))


def _pairs(results: Named) -> Table:
    rows = []
    for name, values in results:
        if found := values.get("preferences"):
            accuracy = percent(found["accuracy"])
            rows.append((word(name), accuracy, number(found["loss"]), number(found["margin"])))
    columns = ("file", "accuracy %", "loss, nats a pair", "margin, nats")
    return Table("Preference pairs (95 % interval)", columns, tuple(rows))


def _comparisons(results: Named) -> Table:
    rows = []
    for name, values in results:
        if found := values.get("win_rate"):
            cases = number(found["n"], "d")
            rows.append((word(name), word("win rate of A, both orders, %"), percent(found), cases, Cell("-")))
        if found := values.get("agreement"):
            told = _interval(found, "kappa", 1, ".3f")
            judges = word(f"Cohen's kappa of {' and '.join(found['judges'])}")
            rows.append((word(name), judges, told, number(found["n"], "d"), Cell("-")))
        if found := values.get("difference"):
            against = word(f"attack success, points above {Path(str(values['arguments'].get('against'))).stem}")
            told, p_value = _interval(found, "difference", 100, "+.1f"), number(found["p_value"], ".3g")
            rows.append((word(name), against, told, number(found["n"], "d"), p_value))
    return Table("Comparisons", ("file", "what", "value (95 %)", "cases", "McNemar's p"), tuple(rows))


def _interval(found: dict[str, Any], name: str, unit: float, form: str) -> Cell:
    """A value with its interval; without cases, or where all of them are alike, there is none."""
    if not isinstance(found[name], (int, float)):
        return Cell("not defined")
    value, low, high = (format(unit * found[key], form) for key in (name, "low", "high"))
    return Cell(f"{value} ({low} to {high})", float(found[name]))


def _tasks(results: Named) -> Table:
    rows = []
    for name, values in results:
        for task, found in (values.get("lm_eval") or {}).items():
            for metric, value in found["metrics"].items():
                plain, _, choice = metric.partition(",")
                error = (found.get("standard_errors") or {}).get(f"{plain}_stderr,{choice}")
                shown = number(value), number(error, ".2g"), number(found["cases"], "d")
                rows.append((word(task), word(name), word(metric), *shown))
    return Table("lm-eval", ("task", "file", "metric", "value", "standard error", "cases"), tuple(rows))
