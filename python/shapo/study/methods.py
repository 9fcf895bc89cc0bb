"""A study's training runs as tables: what was tuned, each method's measures, and each method against baselines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shapo.study.data import TESTS
from shapo.study.intervals import crossed
from shapo.study.markdown import interval, markdown, percent
from shapo.study.queue import Row

__all__ = ["TITLES", "comparison_table", "comparisons_markdown", "method_table", "methods_markdown", "tuning_markdown"]

TITLES = {"test": "in domain", "test_unseen": "unseen categories", "test_attacks": "under attack"}


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
    """Plain DPO for the plain methods; for a perturbed one all plain ones and the controls at the same rise.

    The reward level, which sees no flipped label, is compared with DPO and with itself.
    """
    if not method.startswith("shapo-"):
        return [name for name in methods if name == "dpo" != method]
    reward = method.endswith("-reward")
    plain = [
        name
        for name in methods
        if not name.startswith("shapo-") and (name == "dpo" or name.endswith("-reward") == reward)
    ]
    same = [name for name in methods if name.startswith("shapo-") and _round(name) == _round(method)]
    uniform = [name for name in same if name.startswith("shapo-all")]
    random = [name for name in same if name.startswith(("shapo-like", "shapo-random"))]
    if method in uniform:
        return plain
    return [*plain, *uniform] if method in random else [*plain, *uniform, *random]


def _round(method: str) -> str:
    """Which round of a study a perturbed method is of: perturbed methods are compared within one."""
    found = re.search(r"(-wide)?(-slower|-reward)?$", method)
    return found[0] if found else ""


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


def tuning_markdown(rows: Mapping[str, Row]) -> str:
    lines = []
    for row in rows.values():
        for seen in row.get("watched", ()):
            if seen["update"]:
                settings = row["settings"]
                lines.append(
                    (
                        _tried(settings),
                        f"{settings['target']:g}" if "target" in settings else "-",
                        str(settings["seed"]),
                        f"{row['lr']:g}",
                        str(seen["update"]),
                        f"{seen['loss']:.4f}",
                        f"{100 * seen['accuracy']:.1f}",
                        percent(seen["flips_fitted"]),
                    )
                )
    header = ("method", "rise", "seed", "lr", "updates", "clean selection loss", "accuracy %", "flips fitted %")
    return markdown(header, lines) if lines else ""


def _tried(settings: Mapping[str, Any]) -> str:
    """A method of the tuning, with the loss's parameter where that is what was tried."""
    if settings["method"] != "plain":
        return f"shapo-{settings['method']}"
    given = "".join(f", {key} {settings[key]:g}" for key in ("epsilon", "beta_prime") if key in settings)
    return f"{settings.get('loss', 'dpo')}{given}"


def methods_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    if not table:
        return ""
    header = ["method", "noise", "seeds", "lr", "rho/‖W_S‖", "flips fitted %", "rise at the yardstick", "s/update"]
    header += [f"{what} {TITLES[split]}" for split in TESTS for what in ("accuracy %", "loss")]
    lines = [
        (
            e["method"],
            f"{e['noise']:g}",
            str(len(e["seeds"])),
            ", ".join(f"{lr:g}" for lr in e["lr"]),
            "-" if e["ratio"] is None else f"{e['ratio']:.2g}",
            percent(e["flips_fitted"]),
            "-" if e["yardstick"] is None else f"{e['yardstick']:+.3f}",
            f"{e['seconds_per_update']:.1f}",
            *(text for split in TESTS for text in (percent(e[split]["accuracy"]), _with_spread(e[split]))),
        )
        for e in table
    ]
    return markdown(header, lines)


def comparisons_markdown(table: Sequence[Mapping[str, Any]], what: str) -> str:
    grouped: dict[tuple[str, str, float, int], dict[str, str]] = {}
    for e in table:
        form, scale = ("+.3f", 1.0) if what == "loss" else ("+.1f", 100.0)
        text = interval(e[what], form, scale)
        if what == "loss" and len(e["seeds"]) > 1:
            text += f" [{sum(one < 0 for one in e['by_seed'])}/{len(e['seeds'])}]"
        grouped.setdefault((e["method"], e["baseline"], e["noise"], len(e["seeds"])), {})[e["split"]] = text
    lines = [
        (method, baseline, f"{noise:g}", str(seeds), *(found[split] for split in TESTS))
        for (method, baseline, noise, seeds), found in grouped.items()
    ]
    return markdown(("method", "minus", "noise", "seeds", *TITLES.values()), lines) if lines else ""


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
