"""Results of `shapo evaluate`: attack success beside over-refusal, comparisons, lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapo.reporting.contents import Cell, Section, Table, bounds, number, percent

LIMITS = (
    "Both bounds are given where verdicts could not be read; the interval covers both.",
    "Two judges may differ by more than two models do: compare models by one judge, and judges by their agreement.",
    "Over-refusal belongs beside attack success: a model that refuses everything is attacked in vain.",
)


def sections(results: Sequence[tuple[Path, dict[str, Any]]]) -> list[Section]:
    """One section of all results, a row a file."""
    tables = [_safety(results), _categories(results), _pairs(results), _comparisons(results), _tasks(results)]
    kept = [table for table in tables if table.rows]
    judged = any("attack_success" in values for _, values in results)
    return [Section("Evaluations", [], kept, [], list(LIMITS) if judged else [])] if kept else []


def _safety(results: Sequence[tuple[Path, dict[str, Any]]]) -> Table:
    rows = []
    for path, values in results:
        refusal = values.get("over_refusal")
        refused = bounds(refusal) if isinstance(refusal, dict) else Cell("not measured")
        for benchmark, share in (values.get("attack_success") or {}).items():
            unread = number(share["unreadable"], "d")
            rows.append((Cell(path.stem, path.stem), Cell(benchmark, benchmark), Cell(share["judge"], share["judge"]),
                         number(share["n"], "d"), unread, bounds(share), refused))  # fmt: skip
    columns = ("file", "benchmark", "judge", "prompts", "unreadable", "attack success %", "over-refusal %")
    return Table("Attack success and over-refusal (95 % interval)", columns, tuple(rows))


def _categories(results: Sequence[tuple[Path, dict[str, Any]]]) -> Table:
    rows = [
        (Cell(name, name), Cell(f"{path.stem}, {benchmark}", path.stem), number(group["n"], "d"), bounds(group))
        for path, values in results
        for benchmark, share in (values.get("attack_success") or {}).items()
        if len(share["by_category"]) > 1
        for name, group in share["by_category"].items()
    ]
    return Table("Attack success by category", ("category", "file", "prompts", "attack success %"), tuple(rows))


def _pairs(results: Sequence[tuple[Path, dict[str, Any]]]) -> Table:
    rows = []
    for path, values in results:
        if found := values.get("preferences"):
            accuracy = percent(found["accuracy"])
            rows.append((Cell(path.stem, path.stem), accuracy, number(found["loss"]), number(found["margin"])))
    return Table("Preference pairs", ("file", "accuracy %", "loss", "margin"), tuple(rows))


def _comparisons(results: Sequence[tuple[Path, dict[str, Any]]]) -> Table:
    rows = []
    for path, values in results:
        name = Cell(path.stem, path.stem)
        if found := values.get("win_rate"):
            rows.append(
                (name, Cell("win rate of A, both orders %"), percent(found), number(found["n"], "d"), Cell("-"))
            )
        if found := values.get("agreement"):
            told = Cell(f"{found['kappa']:.3f} ({found['low']:.2f} to {found['high']:.2f})", found["kappa"])
            judges = Cell(f"Cohen's kappa of {' and '.join(found['judges'])}")
            rows.append((name, judges, told, number(found["n"], "d"), Cell("-")))
        if found := values.get("difference"):
            low, high = 100 * found["low"], 100 * found["high"]
            told = Cell(f"{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f})", found["difference"])
            against = Cell(f"points to {Path(str(values['arguments'].get('against'))).stem}")
            rows.append((name, against, told, number(found["n"], "d"), number(found["p_value"], ".3g")))
    return Table("Comparisons", ("file", "what", "value (95 %)", "cases", "McNemar's p"), tuple(rows))


def _tasks(results: Sequence[tuple[Path, dict[str, Any]]]) -> Table:
    rows = [
        (Cell(task, task), Cell(path.stem, path.stem), Cell(metric, metric), number(value), number(found["cases"], "d"))
        for path, values in results
        for task, found in (values.get("lm_eval") or {}).items()
        for metric, value in found["metrics"].items()
    ]
    return Table("lm-eval", ("task", "file", "metric", "value", "cases"), tuple(rows))
