"""A study's rows as tables with intervals.  No model is asked here, and jobs without a row are listed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shapo.errors import UserError
from shapo.reporting.collect import collect
from shapo.reporting.page import render
from shapo.storage.files import write_json, write_text
from shapo.study.intervals import Interval, clustered, crossed
from shapo.study.plan import Plan, study_jobs
from shapo.study.queue import Row, read_rows

TESTS = ("test", "test_unseen", "test_attacks")
_TITLES = {"test": "in domain", "test_unseen": "unseen categories", "test_attacks": "under attack"}


def write_report(folder: Path) -> Path:
    """Writes report.md, report.json and report.html from the rows in `folder`; returns the first's path.

    Raises:
        UserError: The folder holds no study.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} holds no study: {error.strerror}") from error
    rows = read_rows(folder)
    plan = Plan.from_dict(settings["plan"])
    done = {name: row for name, row in rows.items() if "error" not in row}
    tables = {
        "figure1": figure_table(done, "figure1"),
        "benign": figure_table(done, "benign"),
        "methods": method_table(done, plan.beta),
        "comparisons": comparison_table(done, plan.beta),
    }
    write_json(folder / "report.json", {"settings": settings, **tables})
    _plot(folder / "figure1.png", done)
    write_text(folder / "report.md", f"# A study of the method on a real model\n\n{render_tables(plan, rows)}\n")
    if tables["methods"] or tables["figure1"]:  # a page needs something to draw
        write_text(folder / "report.html", render(collect([folder]), title="ShaPO on a real model"))
    return folder / "report.md"


def _plot(path: Path, rows: Mapping[str, Row]) -> None:
    """Figure 1's curves as `shapo sharpness` draws them, where there is a row of all parameters to compare with."""
    from shapo.plots import plot_sharpness
    from shapo.sharpness import FULL, Curve, Point, Sharpness

    found = _of(rows, "figure1")
    if "all" not in found:
        return
    full = {point["rho"]: float(np.mean(point["rise"])) for point in found["all"]["points"]}
    curves = []
    for name, row in sorted(found.items(), key=lambda item: item[0] != "all"):
        points = []
        for point in row["points"]:
            rise, rho = float(np.mean(point["rise"])), point["rho"]
            points.append(Point(rho, rho / row["weight_norm"], rise, rise / full[rho]))
        curves.append(
            Curve(
                FULL if name == "all" else name, row["neurons"], row["weight_norm"], row["gradient_share"], points, []
            )
        )
    pairs = len(found["all"]["groups"])
    plot_sharpness(
        path,
        Sharpness(found["all"]["loss_at_theta"], float("nan"), pairs, curves),
        title=f"Figure 1, {pairs} test pairs",
    )


def figure_table(rows: Mapping[str, Row], family: str) -> list[dict[str, Any]]:
    """Each subspace's rise of the loss at each radius, and its shares of the rises in all parameters and neurons."""
    found = _of(rows, family)
    table = []
    for space, row in found.items():
        for number, point in enumerate(row["points"]):
            entry: dict[str, Any] = {
                "space": space,
                "neurons": row["neurons"],
                "rho": point["rho"],
                "ratio": point["rho"] / row["weight_norm"] if row["weight_norm"] else None,
                "gradient_share": row["gradient_share"],
                "rise": clustered([point["rise"]], row["groups"], lambda mean: mean),
            }
            for whole in ("all", "neurons"):
                if whole in found and space != "all":
                    other = found[whole]["points"][number]["rise"]
                    entry[f"of_{whole}"] = clustered([point["rise"], other], row["groups"], lambda a, b: a / b)
            table.append(entry)
    return table


def method_table(rows: Mapping[str, Row], beta: float) -> list[dict[str, Any]]:
    """Each method at each noise rate: means over its seeds."""
    table = []
    for (method, noise), runs in _runs(rows).items():
        entry: dict[str, Any] = {
            "method": method,
            "noise": noise,
            "seeds": sorted(runs),
            "lr": sorted({run["lr"] for run in runs.values()}),
            "rho": _mean(run["rho"] for run in runs.values()),
            "ratio": _mean(run["ratio"] for run in runs.values()),
            "flips_fitted": _mean(run["flips_fitted"] for run in runs.values()),
            "yardstick": _mean(run["yardstick"]["rise"] if "yardstick" in run else None for run in runs.values()),
            "seconds_per_update": _mean(run["seconds_per_update"] for run in runs.values()),
        }
        for split in TESTS:
            h = np.array([run[split]["h"] for run in runs.values()])
            losses = _loss(h, beta).mean(axis=1)
            entry[split] = {
                "accuracy": float(_correct(h).mean()),
                "margin": float(beta * h.mean()),
                "loss": float(losses.mean()),
                "loss_spread": float(losses.std(ddof=1)) if len(losses) > 1 else None,
            }
        table.append(entry)
    return table


def comparison_table(rows: Mapping[str, Row], beta: float) -> list[dict[str, Any]]:
    """Each method's clean test loss and accuracy minus a baseline's, pair by pair, over the seeds that both have.

    Baselines are the plain methods; for a subspace also the perturbation of all parameters and of random neurons.
    Intervals draw prompts and seeds.
    """
    runs = _runs(rows)
    table = []
    for (method, noise), own in runs.items():
        for baseline in _baselines([name for name, rate in runs if rate == noise], method):
            other = runs[baseline, noise]
            seeds = sorted(set(own) & set(other))
            if not seeds:
                continue
            for split in TESTS:
                a, b = ([np.asarray(run[s][split]["h"]) for s in seeds] for run in (own, other))
                losses = [_loss(x, beta) - _loss(y, beta) for x, y in zip(a, b, strict=True)]
                correct = [_correct(x) - _correct(y) for x, y in zip(a, b, strict=True)]
                groups = own[seeds[0]][split]["groups"]
                table.append(
                    {
                        "method": method,
                        "baseline": baseline,
                        "noise": noise,
                        "split": split,
                        "seeds": seeds,
                        "loss": crossed(losses, groups),
                        "accuracy": crossed(correct, groups),
                        "by_seed": [float(one.mean()) for one in losses],
                    }
                )
    return table


def _baselines(methods: Sequence[str], method: str) -> list[str]:
    perturbed = [name for name in methods if name.startswith("shapo-")]
    controls = [name for name in perturbed if name == "shapo-all" or name.startswith(("shapo-like", "shapo-random"))]
    if method in ("shapo-all", "dpo"):
        controls = []
    plain = [name for name in methods if name not in perturbed]
    if method in plain:
        plain, controls = [name for name in plain if name == "dpo"], []
    elif method in controls:
        controls = [name for name in controls if name == "shapo-all"]
    return [name for name in [*plain, *controls] if name != method]


def _runs(rows: Mapping[str, Row]) -> dict[tuple[str, float], dict[int, Row]]:
    """(method, noise) -> seed -> row, of runs that were measured on the tests."""
    runs: dict[tuple[str, float], dict[int, Row]] = {}
    chosen = rows["choice"]["end"]["lr"] if "choice" in rows else None
    for name, row in rows.items():
        if row["kind"] == "train":
            settings, method = row["settings"], name.split("-noise")[0]
            # The run of the tuning that the selection split chose is DPO at this noise and seed.
            method = "dpo" if settings.get("lr") is not None and settings["lr"] == chosen else method
            runs.setdefault((method, settings["noise"]), {})[settings["seed"]] = row
    return runs


def _of(rows: Mapping[str, Row], family: str) -> dict[str, Row]:
    kinds = {"figure1": "figure", "benign": "figure", "steps": "steps"}
    return {
        name.removeprefix(f"{family}-"): row
        for name, row in rows.items()
        if name.startswith(f"{family}-") and row["kind"] == kinds[family]
    }


def render_tables(plan: Plan, rows: Mapping[str, Row], level: str = "##") -> str:
    """All tables in Markdown, with headings of a level, and what failed or was not run."""
    done = {name: row for name, row in rows.items() if "error" not in row}
    wanted = [job.name for job in study_jobs(plan)]
    missing = [name for name in wanted if name not in done]
    seconds = sum(row["seconds"] for row in rows.values())
    processor = sum(row["cpu_seconds"] for row in rows.values())
    failed = "\n".join(f"* `{name}`: {row['error']}" for name, row in rows.items() if "error" in row)
    compared = comparison_table(done, plan.beta)
    sections = (
        (
            "Rise of the preference loss at a distance rho along its gradient inside a subspace (Figure 1)",
            _figure_markdown(figure_table(done, "figure1")),
        ),
        (
            "The same for the language-modelling loss of harmless answers",
            _figure_markdown(figure_table(done, "benign")),
        ),
        ("Several ascent steps", _steps_markdown(done)),
        ("Neurons with the largest gradient", _largest_markdown(done)),
        ("Shares of the squared gradient, and overlaps", _shares_markdown(done)),
        ("Radii at matched loss increase", _match_markdown(done)),
        ("Learning rates and radii on the selection split", _tuning_markdown(done)),
        ("Methods", _methods_markdown(method_table(done, plan.beta))),
        (
            "Clean test loss minus a baseline's, pair by pair [seeds in which it is lower]",
            _comparisons_markdown(compared, "loss"),
        ),
        ("Accuracy minus a baseline's, in points", _comparisons_markdown(compared, "accuracy")),
        ("Failed", failed),
        ("Not run", _missing_markdown(missing) or "Everything was run."),
    )
    start = (
        f"{len(done)} of {len(wanted)} jobs done in {processor / 60:.0f} minutes of processor time "
        f"({seconds / 60:.0f} by the clock). Intervals are 95 % bootstrap intervals that draw prompts; those of a "
        "comparison of methods draw seeds as well. ± is the standard deviation over seeds."
    )
    parts = [f"{level} {title}\n\n{body}" for title, body in sections if body]
    return "\n\n".join([start, *parts])


def _missing_markdown(missing: Sequence[str]) -> str:
    """The next jobs by name, the others by how many there are of each kind."""
    shown = 24
    families = Counter(
        re.split(r"-noise|-(?=[a-z]+-?\d|all|neurons|benign|outliers)", name)[0] for name in missing[shown:]
    )
    text = ", ".join(f"`{name}`" for name in missing[:shown])
    more = ", ".join(f"{count} of {family}" for family, count in families.items())
    return f"{text}; and {more}" if more else text


def _figure_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    if not table:
        return ""
    lines = [
        (
            e["space"],
            str(e["neurons"]),
            f"{e['rho']:g}",
            "-" if e["ratio"] is None else f"{e['ratio']:.2g}",
            f"{100 * e['gradient_share']:.2f}",
            _interval(e["rise"], "+.4f"),
            _interval(e.get("of_all"), ".1f", 100),
            _interval(e.get("of_neurons"), ".1f", 100),
        )
        for e in table
    ]
    header = (
        "subspace",
        "neurons or rows",
        "rho",
        "rho/‖W_S‖",
        "squared gradient %",
        "rise",
        "of all parameters %",
        "of all neurons %",
    )
    return _markdown(header, lines)


def _steps_markdown(rows: Mapping[str, Row]) -> str:
    lines = []
    for space, row in _of(rows, "steps").items():
        for steps, rises in row["rises"].items():
            found = clustered([rises], row["groups"], lambda mean: mean)
            lines.append((space, f"{row['settings']['rho']:g}", steps, _interval(found, "+.4f")))
    return _markdown(("subspace", "rho", "steps", "rise"), lines) if lines else ""


def _largest_markdown(rows: Mapping[str, Row]) -> str:
    lines = [
        (title, str(rank), one["weight"].split(".")[2], str(one["neuron"]), f"{100 * one['share']:.2f}")
        for name, title in (("gradient", "preference, selection split"), ("benign", "harmless answers"))
        for rank, one in enumerate(rows.get(name, {}).get("largest", ()), 1)
    ]
    return _markdown(("loss", "rank", "layer", "neuron", "of all neurons' squared gradient %"), lines) if lines else ""


def _shares_markdown(rows: Mapping[str, Row]) -> str:
    if "shares" not in rows:
        return ""
    row = rows["shares"]
    shares = [
        (name, f"{100 * s['of_all']:.3f}", f"{100 * s['of_neurons']:.3f}", f"{100 * np.sqrt(s['of_neurons']):.1f}")
        for name, s in row["shares"].items()
    ]
    overlaps = [
        (f"{percent} %", str(o["neurons"]), str(o["common"]), str(o["common_with_probe"]), f"{o['by_chance']:.1f}")
        for percent, o in row["overlaps"].items()
    ]
    return "\n\n".join(
        [
            _markdown(
                ("subspace", "of all parameters' %", "of all neurons' %", "its square root %"),
                shares,
            ),
            _markdown(("gradient's", "neurons", "also the benign loss's", "also the probe's", "by chance"), overlaps),
        ]
    )


def _match_markdown(rows: Mapping[str, Row]) -> str:
    lines = [
        (
            row["settings"]["space"],
            f"{row.get('target') or row['settings']['target']:g}",
            f"{row['rise']:.3f}",
            f"{row['rho']:.4g}",
            f"{row['ratio']:.3g}",
        )
        for row in rows.values()
        if row["kind"] == "match"
    ]
    return _markdown(("subspace", "wanted rise", "rise", "rho", "rho/‖W_S‖"), lines) if lines else ""


def _tuning_markdown(rows: Mapping[str, Row]) -> str:
    lines = []
    for row in rows.values():
        rise = row["settings"].get("target")
        method = "dpo" if row["settings"].get("method") == "plain" else f"shapo-{row['settings'].get('method')}"
        for seen in row.get("watched", ()):
            if seen["update"]:
                lines.append(
                    (
                        method,
                        str(row["settings"]["seed"]),
                        f"{row['lr']:g}",
                        "-" if rise is None else f"{rise:g}",
                        str(seen["update"]),
                        f"{seen['loss']:.4f}",
                        f"{100 * seen['accuracy']:.1f}",
                        _percent(seen["flips_fitted"]),
                    )
                )
    header = ("method", "seed", "lr", "rise", "updates", "clean selection loss", "accuracy %", "flips fitted %")
    return _markdown(header, lines) if lines else ""


def _methods_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    if not table:
        return ""
    header = ["method", "noise", "seeds", "lr", "rho/‖W_S‖", "flips fitted %", "rise at the yardstick", "s/update"]
    header += [f"{what} {_TITLES[split]}" for split in TESTS for what in ("accuracy %", "loss")]
    lines = [
        (
            e["method"],
            f"{e['noise']:g}",
            str(len(e["seeds"])),
            ", ".join(f"{lr:g}" for lr in e["lr"]),
            "-" if e["ratio"] is None else f"{e['ratio']:.2g}",
            _percent(e["flips_fitted"]),
            "-" if e["yardstick"] is None else f"{e['yardstick']:+.3f}",
            f"{e['seconds_per_update']:.1f}",
            *(text for split in TESTS for text in (_percent(e[split]["accuracy"]), _with_spread(e[split]))),
        )
        for e in table
    ]
    return _markdown(header, lines)


def _comparisons_markdown(table: Sequence[Mapping[str, Any]], what: str) -> str:
    grouped: dict[tuple[str, str, float, int], dict[str, str]] = {}
    for e in table:
        form, scale = ("+.3f", 1.0) if what == "loss" else ("+.1f", 100.0)
        text = _interval(e[what], form, scale)
        if what == "loss" and len(e["seeds"]) > 1:
            text += f" [{sum(one < 0 for one in e['by_seed'])}/{len(e['seeds'])}]"
        grouped.setdefault((e["method"], e["baseline"], e["noise"], len(e["seeds"])), {})[e["split"]] = text
    lines = [
        (method, baseline, f"{noise:g}", str(seeds), *(found[split] for split in TESTS))
        for (method, baseline, noise, seeds), found in grouped.items()
    ]
    return _markdown(("method", "minus", "noise", "seeds", *_TITLES.values()), lines) if lines else ""


def _with_spread(entry: Mapping[str, Any]) -> str:
    spread = entry["loss_spread"]
    return f"{entry['loss']:.3f}" if spread is None else f"{entry['loss']:.3f} ± {spread:.3f}"


def _correct(h: Any) -> Any:
    """1 for a pair in the right order, a half for a tie."""
    return (np.sign(np.asarray(h)) + 1) / 2


def _loss(h: Any, beta: float) -> Any:
    return np.logaddexp(0.0, -beta * np.asarray(h, dtype=np.float64))


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _interval(found: Interval | None, form: str, scale: float = 1.0) -> str:
    if found is None:
        return "-"
    value, low, high = (format(scale * number, form) for number in found)
    return f"{value} ({low} to {high})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))
