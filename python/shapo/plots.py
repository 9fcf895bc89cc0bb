"""The plots: accuracy and memorised flips over training, sharpness curves, the probe.  Data in, file out; nothing
is computed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shapo.sharpness import Point, Sharpness
from shapo.storage.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which people with colour-blindness can tell apart; black last.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_training(path: str | os.PathLike[str], runs: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str) -> None:
    """Preference accuracy on clean pairs and share of flipped labels fitted, against the number of updates.

    Args:
        path: PNG to write.
        runs: Method to its evaluation lines (`update`, `accuracy`, `flips_fitted` or None); "reward" in a name draws it
            dashed.
    """
    has_flips = any(row.get("flips_fitted") for rows in runs.values() for row in rows)
    figure = _figure(6.0 * (2 if has_flips else 1) + 2.6, 4.6)
    axes = figure.subplots(1, 2 if has_flips else 1, squeeze=False)[0]
    colors: dict[str, str] = {}
    for name, rows in runs.items():
        family = name.replace(", reward level", "")
        color = colors.setdefault(family, COLORS[len(colors) % len(COLORS)])
        line = "--" if "reward" in name else "-"
        for axis, key in zip(axes, ("accuracy", "flips_fitted"), strict=False):
            points = [(row["update"], 100 * row[key]["value"]) for row in rows if row.get(key)]
            axis.plot(*zip(*points, strict=True), line, color=color, label=name, linewidth=1.6)
    _label(axes[0], "updates", "preference accuracy, clean test pairs (%)")
    axes[0].axhline(50, color="0.6", linewidth=0.8, linestyle=":")
    if has_flips:
        _label(axes[1], "updates", "flipped training labels fitted (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_sharpness(path: str | os.PathLike[str], result: Sharpness, *, title: str) -> None:
    """Loss increase against rho and rho / ||W_S||, and its share of the full space's increase at the same rho."""
    panels = [
        ("by_rho", "rho", "increase", "loss increase (nats per pair)"),
        ("by_ratio", "ratio", "increase", "loss increase (nats per pair)"),
        ("by_rho", "rho", "share", "share of the increase in all parameters (%)"),
    ]
    panels = [panel for panel in panels if any(getattr(curve, panel[0]) for curve in result.curves)]
    figure = _figure(4.6 * len(panels) + 1.0, 4.8)
    for axis, (family, x, y, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, curve in enumerate(result.curves):
            points: list[Point] = [point for point in getattr(curve, family) if getattr(point, y) is not None]
            ys = [getattr(point, y) * (100 if y == "share" else 1) for point in points]
            style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            axis.plot(
                [getattr(point, x) for point in points], ys, label=curve.name, markersize=4, linewidth=1.4, **style
            )
        radii = {getattr(point, x) for curve in result.curves for point in getattr(curve, family)}
        if len(radii) == 1:  # an axis of no width has no logarithm
            axis.set_xlim(min(radii) / 2, max(radii) * 2)
        axis.set_xscale("log")
        if y == "share":
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        elif min(min(line.get_ydata()) for line in axis.lines) > 0:
            axis.set_yscale("log")
        else:
            axis.set_yscale("symlog", linthresh=1e-3)
        _label(
            axis, "radius rho (weight units)" if x == "rho" else "radius relative to the weights, rho / ||W_S||", label
        )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_probe(path: str | os.PathLike[str], accuracies: Sequence[float], *, baseline: float, title: str) -> None:
    """The probe's validation accuracy after each epoch beside the majority class's."""
    figure = _figure(6.2, 4.2)
    axis = figure.subplots()
    axis.plot(
        range(1, len(accuracies) + 1),
        [100 * value for value in accuracies],
        "-o",
        color=COLORS[0],
        markersize=3,
        label="probe",
    )
    axis.axhline(100 * baseline, color=COLORS[1], linestyle="--", label="majority class")
    _label(axis, "epoch", "validation accuracy, unseen prompts (%)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_attack(
    path: str | os.PathLike[str], attacks: Mapping[str, Sequence[Mapping[str, Any]]], *, judge: str
) -> None:
    """Attack success, refusals and harmful loss against steps: the mean over seeds, and a band from lowest to highest.

    Args:
        path: PNG to write.
        attacks: Model to its seeds (`curve` of each: step, loss, attack_success, refusal). Where verdicts could not be
            read the attack success is the middle of its bounds.
        judge: Named in the label.
    """
    panels = (
        ("attack_success", f"attack success, {judge} (%)"),
        ("refusal", "refusals, by substring (%)"),
        ("loss", "loss on held-out harmful answers"),
    )
    figure = _figure(13.0, 4.2)
    for axis, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for number, (name, seeds) in enumerate(attacks.items()):
            steps = [point["step"] for point in seeds[0]["curve"]]
            values = [[_value(point[key]) for point in seed["curve"]] for seed in seeds]
            columns = list(zip(*values, strict=True))
            color = COLORS[number % len(COLORS)]
            axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2)
            means = [sum(c) / len(c) for c in columns]
            axis.plot(steps, means, color=color, label=name, linewidth=1.6, marker="o", markersize=4)
        _label(axis, "fine-tuning steps", label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    _save(figure, path)


def plot_soft_labels(path: str | os.PathLike[str], labels: Mapping[float, Any], *, title: str) -> None:
    """Histograms of the reward level's soft labels, one for each beta_r (Figure 5 of arXiv:2602.07340).

    Args:
        path: PNG to write.
        labels: beta_r to the soft labels of all pairs, in [0, 1].
        title: Of the figure.
    """
    figure = _figure(3.0 * len(labels) + 1.0, 3.4)
    for axis, (beta, values) in zip(
        figure.subplots(1, len(labels), squeeze=False, sharey=True)[0], labels.items(), strict=True
    ):
        axis.hist([float(value) for value in values], bins=20, range=(0.0, 1.0), color=COLORS[0])
        axis.set_title(f"beta_r {beta:g}", fontsize=10)
        _label(axis, "soft label", "pairs")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _value(point: Any) -> float:
    return 50 * (point["low"] + point["high"]) if isinstance(point, Mapping) else float(point)


def plot_differences(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    label: str,
    title: str,
    signed: bool = True,
) -> None:
    """Differences or shares with their intervals, a panel a measure and a line a case; 0 is marked.

    Args:
        path: PNG or SVG to write.
        panels: Title -> name of a comparison -> estimate, lower and upper limit. All panels have the same comparisons.
        label: Of the horizontal axes.
        title: Of the whole.
        signed: Colour tells on which side of 0 an interval lies.
    """
    names = list(next(iter(panels.values())))
    figure = _figure(3.2 * len(panels) + 2.6, 0.32 * len(names) + 1.5)
    for axis, (panel, found) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True
    ):
        for row, name in enumerate(names):
            value, low, high = found[name]
            color = "0.45" if low <= 0 <= high else COLORS[0] if value < 0 or not signed else COLORS[1]
            axis.plot([low, high], [row, row], color=color, linewidth=1.6)
            axis.plot([value], [row], "o", color=color, markersize=4.5)
        axis.axvline(0, color="0.3", linewidth=0.8)
        _label(axis, label, "")
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.set_title(panel, fontsize=10)
    axis.set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot there is no global state and no window system to look for.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(True, color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """PNG, or SVG by the path's ending; an SVG of the same data is the same file."""
    from matplotlib import rc_context

    svg = os.fspath(path).endswith(".svg")
    with atomic_file(path) as temporary, rc_context({"svg.hashsalt": "shapo", "svg.fonttype": "none"}):
        figure.savefig(temporary, format="svg" if svg else "png", metadata={"Date": None} if svg else None)
