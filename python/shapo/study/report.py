"""A study's rows as tables with intervals.  No model is asked here, and jobs without a row are listed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shapo.errors import UserError
from shapo.reporting.collect import collect
from shapo.reporting.page import render
from shapo.statistics import wilson
from shapo.storage.files import write_json, write_text
from shapo.study.intervals import Interval, clustered
from shapo.study.jobs import study_jobs
from shapo.study.markdown import interval, markdown
from shapo.study.methods import (
    TITLES,
    comparison_table,
    comparisons_markdown,
    method_table,
    methods_markdown,
    tuning_markdown,
)
from shapo.study.plan import Plan
from shapo.study.queue import Row, read_rows


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
    plot_shares(folder / "shares.png", done)
    plot_comparisons(folder / "comparisons.png", tables["comparisons"])
    plot_labels(folder / "soft_labels.png", done)
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


def plot_shares(path: Path, rows: Mapping[str, Row]) -> None:
    """Figure 1's shares with their intervals, largest first; needs the rises in all neurons and in all parameters."""
    from shapo.plots import plot_differences

    table = [entry for entry in figure_table(rows, "figure1") if "of_all" in entry and "of_neurons" in entry]
    radii = sorted({entry["rho"] for entry in table})
    if not radii:
        return
    rho = radii[len(radii) // 2]
    shown = sorted((e for e in table if e["rho"] == rho), key=lambda e: -e["of_neurons"][0])
    panels: dict[str, dict[str, Interval]] = {}
    for whole, title in (("of_neurons", "of the rise in all neurons"), ("of_all", "of the rise in all parameters")):
        panels[title] = {f"{e['space']} ({e['neurons']})": tuple(100 * x for x in e[whole]) for e in shown}
    plot_differences(path, panels, label="share, %", title=f"Figure 1 at rho {rho:g} (95 %)", signed=False)


def plot_labels(path: Path, rows: Mapping[str, Row]) -> None:
    """Figure 5's histograms of the reward model's soft labels, where there is one."""
    from shapo.plots import plot_soft_labels

    found = rows.get("reward", {}).get("histograms", {})
    if not found:
        return
    labels = {
        float(beta): np.repeat((np.arange(len(counts)) + 0.5) / len(counts), counts) for beta, counts in found.items()
    }
    pairs = sum(next(iter(found.values())))
    plot_soft_labels(path, labels, title=f"Figure 5, soft labels of {pairs} training pairs")


def plotted(entry: Mapping[str, Any]) -> bool:
    """Whether a comparison is drawn: those with plain DPO, and of a selection with a control.

    The reward level, which sees no flipped label, is many times further from DPO: beside it nothing else could be read.
    """
    same_labels = not entry["method"].endswith("-reward")
    return bool(same_labels and (entry["baseline"] == "dpo" or entry["baseline"].startswith("shapo-")))


def plot_comparisons(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """The differences of the clean loss that are `plotted`, where there are any."""
    from shapo.plots import plot_differences

    panels: dict[str, dict[str, Interval]] = {title: {} for title in TITLES.values()}
    for entry in sorted(table, key=lambda entry: (-entry["noise"], entry["baseline"] != "dpo")):
        if plotted(entry):
            name = f"{entry['method']} - {entry['baseline']}"
            name += f", {len(entry['seeds'])} seeds, {100 * entry['noise']:g} % flipped"
            panels[TITLES[entry["split"]]][name] = entry["loss"]
    if all(panels.values()):
        plot_differences(
            path, panels, label="difference of the clean loss", title="Left of 0: the first method is better (95 %)"
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


def _of(rows: Mapping[str, Row], family: str) -> dict[str, Row]:
    kind = "steps" if family == "steps" else "figure"
    return {
        name.removeprefix(f"{family}-"): row
        for name, row in rows.items()
        if name.startswith(f"{family}-") and row["kind"] == kind
    }


def render_tables(plan: Plan, rows: Mapping[str, Row], level: str = "##", *, figure: bool = True) -> str:
    """All tables in Markdown, with headings of a level, and what failed or was not run.

    Args:
        plan: Whose jobs should have been run.
        rows: Those there are.
        level: Of the headings.
        figure: Also what is known of the initial model: Figure 1 and the gradients.
    """
    done = {name: row for name, row in rows.items() if "error" not in row}
    wanted = [job.name for job in study_jobs(plan)]
    missing = [name for name in wanted if name not in done]
    seconds = sum(row["seconds"] for row in rows.values())
    processor = sum(row["cpu_seconds"] for row in rows.values())
    failed = "\n".join(f"* `{name}`: {row['error']}" for name, row in rows.items() if "error" in row)
    compared = comparison_table(done, plan.beta)
    of_the_model = (
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
    )
    kept = dict.fromkeys(row["settings"].get("kept") or "start" for row in done.values() if "kept" in row["settings"])
    sections = (
        *(
            (f"Figure 1 at the model of `{name}`", _figure_markdown(figure_table(done, f"aligned-{name}")))
            for name in kept
        ),
        ("The reward model's head", _reward_markdown(done)),
        ("Refusals in generated answers", _answers_markdown(done)),
        ("Radii at matched loss increase", _match_markdown(done)),
        ("Learning rates and rises on the selection split", tuning_markdown(done)),
        ("Methods", methods_markdown(method_table(done, plan.beta))),
        (
            "Clean test loss minus a baseline's, pair by pair [seeds in which it is lower]",
            comparisons_markdown(compared, "loss"),
        ),
        ("Accuracy minus a baseline's, in points", comparisons_markdown(compared, "accuracy")),
        ("Failed", failed),
        ("Not run", _missing_markdown(missing) or "Everything was run."),
    )
    start = (
        f"{len(done)} of {len(wanted)} jobs done in {processor / 60:.0f} minutes of processor time "
        f"({seconds / 60:.0f} by the clock). Intervals are 95 % bootstrap intervals that draw prompts; those of a "
        "comparison of methods draw seeds as well. ± is the standard deviation over seeds."
    )
    parts = [
        f"{level} {title}\n\n{body}" for title, body in ((*of_the_model, *sections) if figure else sections) if body
    ]
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
            interval(e["rise"], "+.4f"),
            interval(e.get("of_all"), ".1f", 100),
            interval(e.get("of_neurons"), ".1f", 100),
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
    return markdown(header, lines)


def _steps_markdown(rows: Mapping[str, Row]) -> str:
    lines = []
    for space, row in _of(rows, "steps").items():
        for steps, rises in row["rises"].items():
            found = clustered([rises], row["groups"], lambda mean: mean)
            lines.append((space, f"{row['settings']['rho']:g}", steps, interval(found, "+.4f")))
    return markdown(("subspace", "rho", "steps", "rise"), lines) if lines else ""


def _largest_markdown(rows: Mapping[str, Row]) -> str:
    lines = [
        (title, str(rank), one["weight"].split(".")[2], str(one["neuron"]), f"{100 * one['share']:.2f}")
        for name, title in (("gradient", "preference, selection split"), ("benign", "harmless answers"))
        for rank, one in enumerate(rows.get(name, {}).get("largest", ()), 1)
    ]
    return markdown(("loss", "rank", "layer", "neuron", "of all neurons' squared gradient %"), lines) if lines else ""


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
            markdown(
                ("subspace", "of all parameters' %", "of all neurons' %", "its square root %"),
                shares,
            ),
            markdown(("gradient's", "neurons", "also the benign loss's", "also the probe's", "by chance"), overlaps),
        ]
    )


def _answers_markdown(rows: Mapping[str, Row]) -> str:
    answers = {name.removeprefix("answers-"): row for name, row in rows.items() if row["kind"] == "answers"}
    lines = []
    for name, row in sorted(answers.items(), key=lambda item: item[0] != "start"):
        cells = []
        for kind in ("harmful", "harmless"):
            refused = row[kind]["refused"]
            share = wilson(sum(refused), len(refused))
            cells.append(f"{sum(refused)} of {len(refused)} ({100 * share.low:.0f} to {100 * share.high:.0f} %)")
            for other in ("start", "dpo"):
                if other == name or other not in answers:
                    cells.append("-")
                    continue
                more = np.subtract(refused, answers[other][kind]["refused"])
                # Where no answer differs there is nothing to draw, and no interval that says something.
                found = clustered([more], range(len(more)), lambda mean: mean) if more.any() else None
                cells.append(interval(found, "+.1f", 100) if found else "none differs")
            cells.append(f"{row[kind]['tokens']:.0f}")
        lines.append((name, *cells))
    header = ("model", *(text.format(kind) for kind in ("harmful", "harmless") for text in _REFUSALS))
    return markdown(header, lines) if lines else ""


_REFUSALS = ("{}: refused", "minus the start's, points", "minus DPO's, points", "tokens")


def _reward_markdown(rows: Mapping[str, Row]) -> str:
    if "reward" not in rows:
        return ""
    row = rows["reward"]
    lines = [(beta, f"{100 * share:.1f}") for beta, share in row["saturated"].items()]
    return (
        f"Right on {100 * row['accuracy']:.1f} % of {row['pairs']} pairs of held-out prompts of the selection split, "
        f"and on {100 * row['agreement']:.1f} % of the training split's clean pairs. The runs take beta_r = "
        f"{row['beta_reward']:.3g}."
        f"\n\n{markdown(('beta_r', 'soft labels within 0.01 of 0 or 1, %'), lines)}"
    )


def _match_markdown(rows: Mapping[str, Row]) -> str:
    lines = [
        (
            row["settings"]["space"],
            f"{row['settings']['target'] or row['target']:g}",
            f"{row['rise']:.3f}",
            f"{row['rho']:.4g}",
            f"{row['ratio']:.3g}",
        )
        for row in rows.values()
        if row["kind"] == "match"
    ]
    return markdown(("subspace", "wanted rise", "rise", "rho", "rho/‖W_S‖"), lines) if lines else ""
