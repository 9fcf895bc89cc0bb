"""Results that hold several methods by themselves: the demo's, a study's, and sharpness (Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapo.reporting.contents import Cell, Chart, Point, Section, Series, Table, number, percent, word
from shapo.training.metrics import read_metrics

Given = Sequence[tuple[Path, dict[str, Any]]]

_SHARPNESS_LIMITS = (
    "To first order a subspace with a share s of the squared gradient gives sqrt(s) of the full increase at the same "
    "rho: look at the random ones before crediting a selected one.",
    "At the same rho/‖W_S‖ the picture is another than at the same rho.",
)


def demo(given: Given) -> list[Section]:
    """The demo: methods, curves over training, sharpness of plain DPO."""
    made = []
    for path, values in given:
        noise = values["settings"].get("noise", 0)
        text = [
            f"A small Llama on generated data, size {values['size']}, seed {values['seed']}, "
            f"{100 * noise:g} % of the training labels flipped. {values['seconds']:.0f} s in all.",
        ]
        charts = [*_demo_curves(path, values), *_sharpness_charts(values["sharpness"])]
        limits = [
            "One seed, and data made of templates: nothing here is evidence about the safety of a real model.",
            "Much of the resistance to flipped labels can be had from a smaller learning rate or from stopping early.",
            *_SHARPNESS_LIMITS,
        ]
        made.append(Section(f"Demo: {path.name}", text, [_demo_methods(values)], charts, limits))
    return made


def _demo_methods(values: Mapping[str, Any]) -> Table:
    columns = ("method", "accuracy % (95 %)", "unseen %", "clean loss", "flips fitted %", "loss increase", "rho/‖W_S‖",
               "ms an update")  # fmt: skip
    rows = tuple(
        (
            word(row["name"]),
            percent(row["test"]["accuracy"]),
            percent(row["unseen"]["accuracy"]),
            number(row["test"]["loss"], ".3f"),
            percent(row["flips_fitted"]),
            number(row["increase"], "+.3f"),
            number(row["rho_over_weight_norm"], ".2g"),
            number(1e3 * row["seconds_per_update"], ".0f"),
        )
        for row in values["methods"]
    )
    return Table("Methods", columns, rows)


def _demo_curves(path: Path, values: Mapping[str, Any]) -> list[Chart]:
    charts = []
    for key, title, y in (
        ("accuracy", "Preference accuracy over training", "accuracy on clean test pairs (%)"),
        ("flips_fitted", "Flipped labels fitted over training", "flipped training labels fitted (%)"),
    ):
        series = []
        for row in values["methods"]:
            metrics = path / "methods" / row["slug"] / "metrics.jsonl"
            found = read_metrics(metrics, "evaluation") if metrics.is_file() else []
            points = tuple(Point(line["update"], line[key]["value"]) for line in found if line.get(key))
            if points:
                series.append(Series(row["name"], points))
        if series:
            charts.append(Chart(title, "updates", y, tuple(series), percent=True))
    return charts


def sharpness(given: Given) -> list[Section]:
    """Figure 1 of each folder of `shapo sharpness`."""
    made = []
    for path, values in given:
        arguments = values.get("arguments", {})
        text = [
            f"Model {arguments.get('model')}; its loss on {values['pairs']} pairs is {values['loss']:.4f} nats each."
        ]
        charts, tables = _sharpness_charts(values), [_subspaces(values)]
        made.append(Section(f"Figure 1, sharpness: {path.name}", text, tables, charts, list(_SHARPNESS_LIMITS)))
    return made


def _subspaces(values: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            word(curve["name"]),
            number(curve["neurons"], "d"),
            number(curve["weight_norm"], ".3g"),
            number(100 * curve["gradient_share"], ".2f"),
        )
        for curve in values["curves"]
    )
    return Table("Subspaces", ("subspace", "neurons or rows", "‖W_S‖", "share of the squared gradient %"), rows)


def _sharpness_charts(values: Mapping[str, Any]) -> list[Chart]:
    kinds = (
        ("by_rho", "rho", "increase", "Loss increase at the same rho", "radius rho", False),
        ("by_ratio", "ratio", "increase", "Loss increase at the same rho/‖W_S‖", "rho/‖W_S‖", False),
        ("by_rho", "rho", "share", "Share of the increase in all parameters", "radius rho", True),
    )
    charts = []
    for family, x, y, title, label, share in kinds:
        series = []
        for curve in values["curves"]:
            points = tuple(Point(p[x], p[y]) for p in curve[family] if isinstance(p[y], (int, float)))
            if points:
                series.append(Series(curve["name"], points))
        if series:
            unit = "of the full increase" if share else "nats a pair"
            charts.append(Chart(title, label, unit, tuple(series), log_x=True, log_y=not share))
    return charts


def study(given: Given) -> list[Section]:
    """A study on a real model: methods over seeds and noise, differences pair by pair, Figure 1."""
    made = []
    for path, values in given:
        tables = [table for table in (_study_methods(values), _study_differences(values)) if table.rows]
        charts = [
            chart
            for key, title in (
                ("figure1", "Rise of the preference loss inside a subspace"),
                ("benign", "Rise of the loss of harmless answers"),
            )
            for chart in _rises(values.get(key) or [], title)
        ]
        if not tables and not charts:
            continue
        limits = [
            "Few prompts: intervals draw prompts, and those of single seeds say nothing about other seeds.",
            *_SHARPNESS_LIMITS,
        ]
        made.append(Section(f"Study: {path.name}", _study_text(values.get("settings") or {}), tables, charts, limits))
    if not made:
        raise ValueError("the study has no finished jobs")
    return made


def _study_text(settings: Mapping[str, Any]) -> list[str]:
    plan, name = settings.get("plan") or {}, settings.get("model_name")
    if not (name and plan):
        return []
    size = f"{plan['updates']} updates of {plan['batch_size']} pairs, at most {plan['max_length']} tokens each"
    return [f"Model {Path(str(name)).name}; a run has {size}."]


def _study_methods(values: Mapping[str, Any]) -> Table:
    columns = (
        "method",
        "flipped %",
        "seeds",
        "test %",
        "unseen %",
        "attacks %",
        "clean loss",
        "flips fitted %",
        "rho/‖W_S‖",
    )
    rows = tuple(
        (
            word(row["method"]),
            number(100 * row["noise"], ".0f"),
            number(len(row["seeds"]), "d"),
            *(percent(row[split]["accuracy"]) for split in ("test", "test_unseen", "test_attacks")),
            number(row["test"]["loss"], ".3f"),
            percent(row["flips_fitted"]),
            number(row["ratio"], ".2g"),
        )
        for row in values.get("methods") or []
    )
    return Table("Methods (mean over seeds)", columns, rows).without_empty()


def _study_differences(values: Mapping[str, Any]) -> Table:
    columns = ("method", "against", "flipped %", "split", "seeds", "difference of the clean loss (95 %)")
    rows = tuple(
        (
            word(row["method"]),
            word(row["baseline"]),
            number(100 * row["noise"], ".0f"),
            word(row["split"]),
            number(len(row["seeds"]), "d"),
            Cell(f"{row['loss'][0]:+.4f} ({row['loss'][1]:+.4f} to {row['loss'][2]:+.4f})", row["loss"][0]),
        )
        for row in values.get("comparisons") or []
    )
    return Table("Clean loss against a baseline, pair by pair", columns, rows)


def _rises(rows: Sequence[Mapping[str, Any]], title: str) -> list[Chart]:
    spaces: dict[str, list[Point]] = {}
    for row in rows:
        spaces.setdefault(row["space"], []).append(Point(row["rho"], *row["rise"]))
    if not spaces:
        return []
    series = tuple(Series(name, tuple(points)) for name, points in spaces.items())
    return [Chart(title, "radius rho", "nats a pair", series, "95 % interval over prompts", log_x=True, log_y=True)]
