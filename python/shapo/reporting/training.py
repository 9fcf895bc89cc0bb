"""Runs of `shapo train`: methods side by side, seeds together, and curves over training.

Runs belong together where they start from the same model and are measured on the same held-out pairs after training
on the same data with the same share of flipped labels; every such set is a section of its own. Of a run that is not
finished the curves are drawn as far as they go, apart from those of finished ones, and marked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapo.reporting.contents import UNFINISHED, Cell, Chart, Section, Series, Table, number, over_seeds, percent, word
from shapo.training.metrics import read_metrics

Run = tuple[Path, dict[str, Any]]

# What tells runs of one method apart without making another method of them.
_NOT_THE_METHOD = {
    *("output", "seed", "noise_seed", "resume", "overwrite", "quiet", "eval_every", "save_every", "device", "command"),
    *("data", "eval_data", "split", "eval_split", "limit", "eval_limit", "format", "preference", "model", "noise"),
    *("fused_head", "config", "report_to", "keep", "stream", "push_to_hub"),
}
# What is named of a set of runs where sets differ in it.
_DATA = ("model", "data", "split", "limit", "format", "preference", "noise", "eval_data", "eval_split", "eval_limit")
_NAMED = {"loss", "rho", "relative_rho", "subspace"}

BATCH_LOSS = "batch loss"
MOST_POINTS = 50

LIMITS = (
    "Intervals are over pairs, not over seeds: with fewer than five seeds a difference within them says nothing.",
    "The same rho is a strong perturbation in few neurons and a weak one in all weights: look at rho/‖W_S‖ too.",
    "Preference accuracy is about which of two given answers a model finds likelier, not about what it would answer.",
)


def sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each set of runs that may be compared."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_comparable(run[1]), []).append(run)
    first = [members[0][1]["arguments"] for members in groups.values()]
    differing = [name for name in _DATA if any(given.get(name) != first[0].get(name) for given in first)]
    titles = ["; ".join(_named(name, given.get(name)) for name in differing) for given in first]
    made = [_section(members) for members in groups.values()]
    if len(made) > 1:
        for number, (section, title) in enumerate(zip(made, titles, strict=True), 1):
            # Files can have been changed under the same name; then a number tells the sets apart.
            section.title += f": {title}" if titles.count(title) == 1 else f", set {number}"
        made[0].text.insert(0, f"The runs are of {len(made)} different data or starting models, each in a section.")
    return made


def start_of(folder: Path) -> dict[str, Any] | None:
    """What the first line of an unfinished run's metrics says of it; None where there is no such line."""
    found = read_metrics(folder / "metrics.jsonl", "start")
    return {**found[0], "unfinished": True} if found and isinstance(found[0].get("arguments"), Mapping) else None


def distinct(runs: Sequence[Run]) -> tuple[list[Run], list[tuple[str, str]]]:
    """One run of each method, data and seed, and the others with the reason: a run repeated is no second seed.

    A finished one goes before an unfinished one.
    """
    kept: dict[str, Run] = {}
    repeated = []
    for folder, values in sorted(runs, key=lambda run: "unfinished" in run[1]):
        arguments = values["arguments"]
        seeds = [arguments.get("seed"), arguments.get("noise_seed") if arguments.get("noise") else None]
        data = values.get("digests", {}).get("data")
        key = json.dumps([_comparable(values), _name(arguments), _settings(arguments), data, *seeds])
        if key in kept:
            repeated.append((str(folder), f"the same settings and seed as {kept[key][0]}"))
        else:
            kept[key] = (folder, values)
    return list(kept.values()), repeated


def _settings(arguments: Mapping[str, Any]) -> str:
    """What makes a method besides its name."""
    return json.dumps({k: v for k, v in arguments.items() if k not in _NOT_THE_METHOD | _NAMED}, sort_keys=True)


def _comparable(values: Mapping[str, Any]) -> str:
    arguments = values["arguments"]
    digests = values.get("digests", {})
    named = [arguments.get(name) for name in ("data", "split", "limit", "format", "preference")]
    # With flipped labels the digest is another for each seed of the flips.
    digest = None if arguments.get("noise") else digests.get("data")
    key = {
        "model": digests.get("base") or digests.get("model") or arguments.get("model"),
        "data": digest or named,
        "noise": arguments.get("noise"),
        "evaluation": digests.get("evaluation") or [arguments.get(f"eval_{n}") for n in ("data", "split", "limit")],
    }
    return json.dumps(key, sort_keys=True)


def _named(name: str, value: Any) -> str:
    if name in ("data", "eval_data", "model"):
        shown = ", ".join(Path(str(part)).name for part in (value if isinstance(value, list) else [value]))
        return {"data": "", "eval_data": "measured on ", "model": "from "}[name] + shown
    if name == "noise":
        return f"{100 * (value or 0):g} % flipped"
    return f"{name.replace('_', ' ')} {'default' if value is None else value}"


def _section(runs: list[Run]) -> Section:
    arguments = runs[0][1]["arguments"]
    noise = arguments.get("noise") or 0
    text = [
        f"Started from {arguments.get('model')}, trained on {_sources(arguments)}"
        + (f" with {100 * noise:g} % of the labels flipped" if noise else "")
        + f", measured on {arguments.get('eval_data') or 'no held-out pairs'}."
    ]
    methods = _methods(runs)
    finished = {name: members for name, members in methods.items() if not _unfinished(members)}
    tables = [_table(finished)] if finished else []
    section = Section("Training", text, tables, _charts(methods), list(LIMITS))
    if len(finished) < len(methods):
        told = [f"{folder} ({_progress(folder, values)})" for folder, values in runs if "unfinished" in values]
        text.append(f"Not finished, so in the curves alone, which are dotted: {', '.join(told)}.")
    if finished and min(len(members) for members in finished.values()) == 1:
        section.limits.insert(0, "Some methods were run with one seed only.")
    return section


def _unfinished(runs: Sequence[Run]) -> bool:
    return "unfinished" in runs[0][1]


def _progress(folder: Path, values: Mapping[str, Any]) -> str:
    done = read_metrics(folder / "metrics.jsonl", "update")
    return f"{done[-1]['update'] if done else 0} of {values['updates']} updates"


def _methods(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by the name of their method; settings that differ within a name become part of it.

    Unfinished runs have names of their own: a mean with theirs would end where they do.
    """
    by_name: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        arguments = run[1]["arguments"]
        by_name.setdefault(_name(arguments), {}).setdefault(_settings(arguments), []).append(run)
    methods: dict[str, list[Run]] = {}
    for name, variants in by_name.items():
        settings = [json.loads(key) for key in variants]
        differing = sorted(k for k in settings[0] if any(s.get(k) != settings[0][k] for s in settings))
        for found, members in zip(settings, variants.values(), strict=True):
            told = ", ".join(f"{k.replace('_', ' ')} {_shown(k, found.get(k))}" for k in differing)
            whole = f"{name} ({told})" if told else name
            for ending, part in (
                ("", [run for run in members if "unfinished" not in run[1]]),
                (UNFINISHED, [run for run in members if "unfinished" in run[1]]),
            ):
                if part:
                    methods[whole + ending] = part
    return methods


def _sources(arguments: Mapping[str, Any]) -> str:
    data, split = arguments.get("data"), arguments.get("split")
    texts = [str(source) for source in (data if isinstance(data, list) else [data])]
    return ", ".join(texts) + (f" (split {split})" if split else "")


def _shown(setting: str, value: Any) -> str:
    if value is None:
        return "none" if setting == "lora" else "default"
    return str(value)


def _name(arguments: Mapping[str, Any]) -> str:
    name = str(arguments.get("loss"))
    if arguments.get("rho") is None:
        return name
    radius = arguments["rho"]
    shown = "-".join(f"{r:g}" for r in radius) if isinstance(radius, list) else f"{radius:g}"
    unit = " ‖W_S‖" if arguments.get("relative_rho") else ""
    return f"{name} + ShaPO, {Path(str(arguments.get('subspace'))).stem}, rho {shown}{unit}"


def _table(methods: Mapping[str, list[Run]]) -> Table:
    columns = ("method", "seeds", "accuracy %", "loss", "margin", "flips fitted %", "rho/‖W_S‖", "ms an update")
    rows = []
    for name, runs in methods.items():
        finals = [values["final"] for _, values in runs]
        times = [1e3 * values["seconds_per_update"] for _, values in runs]
        ratios = [v["rho_over_weight_norm"] for _, v in runs if v["rho_over_weight_norm"] is not None]
        rows.append(
            (
                word(name),
                number(len(runs), "d"),
                _accuracy(runs),
                number(_mean([f.get("loss") for f in finals])),
                number(_mean([f.get("margin") for f in finals])),
                percent(_mean([f.get("flips_fitted") for f in finals])),
                number(_mean(ratios), ".2g"),
                number(_mean(times), ".0f"),
            )
        )
    return Table("Methods at the end of training (mean over seeds)", columns, tuple(rows)).without_empty()


def _accuracy(runs: list[Run]) -> Cell:
    """One seed with its Wilson interval; several with the lowest and highest seed."""
    if len(runs) == 1:
        evaluations = _evaluations(runs[0][0])
        return percent(evaluations[-1].get("accuracy") if evaluations else None)
    values = [v["final"]["accuracy"] for _, v in runs if v["final"].get("accuracy") is not None]
    if not values:
        return Cell("-")
    middle = sum(values) / len(values)
    return Cell(f"{100 * middle:.1f} (seeds {100 * min(values):.1f} to {100 * max(values):.1f})", middle)


def _charts(methods: Mapping[str, list[Run]]) -> list[Chart]:
    charts = []
    kinds = (
        ("accuracy", "Preference accuracy over training", "accuracy on held-out pairs (%)", True),
        ("flips_fitted", "Flipped labels fitted over training", "flipped training labels fitted (%)", True),
        ("loss", "Clean loss over training", "DPO's loss on held-out pairs (nats a pair)", False),
        (BATCH_LOSS, "Training loss", "loss of the batches, before the perturbation of ShaPO", False),
    )
    for key, title, y, share in kinds:
        series = []
        for name, runs in methods.items():
            curves = [_curve(folder, key) for folder, _ in runs]
            curves = [curve for curve in curves if curve]
            if curves and (points := over_seeds(curves)):
                series.append(Series(name, points, dotted=_unfinished(runs)))
        if series:
            several = any(point.low is not None for s in series for point in s.points)
            charts.append(Chart(title, "updates", y, tuple(series), "lowest to highest seed" if several else "", share))
    return charts


def _curve(folder: Path, key: str) -> list[tuple[float, float]]:
    if key == BATCH_LOSS:
        return _batch_losses(folder)
    found = [(row["update"], row.get(key)) for row in _evaluations(folder)]
    values = [(x, v["value"] if isinstance(v, Mapping) else v) for x, v in found]
    return [(float(x), float(v)) for x, v in values if isinstance(v, (int, float))]


def _batch_losses(folder: Path) -> list[tuple[float, float]]:
    """The loss at the weights themselves, as means of neighbouring updates: at most about `MOST_POINTS` points."""
    path = folder / "metrics.jsonl"
    rows = read_metrics(path, "update") if path.is_file() else []
    found = [(row["update"], row.get("ascent_loss", row.get("loss"))) for row in rows]
    values = [(float(x), float(v)) for x, v in found if isinstance(v, (int, float))]
    size = -(-len(values) // MOST_POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), max(size, 1))]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return list(read_metrics(path, "evaluation")) if path.is_file() else []


def _mean(values: Sequence[Any]) -> float | None:
    known = [value for value in values if isinstance(value, (int, float))]
    return sum(known) / len(known) if known else None
