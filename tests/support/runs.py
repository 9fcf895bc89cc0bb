"""Folders as the commands leave them, with numbers chosen by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SECRET = "SECRET of a prompt or an answer"


def train_run(folder: Path, *, seed: int = 0, accuracy: tuple[float, ...] = (0.5, 0.75), **arguments: Any) -> Path:
    """A finished run of `shapo train` with an evaluation at updates 0, 10, ..."""
    given = {
        "model": "start",
        "data": "train.jsonl",
        "eval_data": "test.jsonl",
        "noise": 0.3,
        "loss": "dpo",
        "lr": 1e-3,
        "rho": None,
        "relative_rho": False,
        "subspace": None,
        "seed": seed,
        "output": str(folder),
        "limit": None,
        **arguments,
    }
    folder.mkdir(parents=True)
    start = {"kind": "start", "update": 0, "updates": 10, "arguments": given, "versions": {}, "digests": {}}
    lines = [start] + [
        {
            "kind": "evaluation",
            "update": 10 * n,
            "accuracy": share(value),
            "loss": 1 - value,
            "flips_fitted": share(0.25),
        }
        for n, value in enumerate(accuracy)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = (
        {}
        if not accuracy
        else {"accuracy": accuracy[-1], "loss": 1 - accuracy[-1], "margin": 0.125, "flips_fitted": 0.25}
    )
    ratio = 0.5 if given["rho"] else None
    values = {"arguments": given, "versions": {"shapo_kernels": "1"}, "updates": 10, "seconds_per_update": 0.25,
              "rho_over_weight_norm": ratio, "flipped": 3, "final": final}  # fmt: skip
    write(folder / "run.json", values)
    return folder


def attack(folder: Path, *, unsafe: tuple[float, ...] = (0.25, 0.75), data: str = "d") -> Path:
    """A finished attack of two seeds; the second is 0.125 worse after the start."""
    seeds = []
    for seed in (0, 1):
        curve = []
        for n, value in enumerate(unsafe):
            success = bounded(value + (0.125 * seed if n else 0))
            point = {"step": 5 * n, "loss": 4.0 - n, "attack_success": success, "refusal": bounded(0.5), "finished": 8}
            curve.append(point)
        seeds.append({"seed": seed, "curve": curve})
    arguments = {"model": folder.name, "examples": 8, "lora": 0, "lr": 1e-5, "batch_size": 4, "max_new_tokens": 16}
    folder.mkdir(parents=True)
    values = {"kind": "attack", "arguments": arguments, "judge": "probe", "data": data, "prompts": "p", "seeds": seeds}
    write(folder / "attack.json", values)
    return folder


def sharpness(folder: Path) -> Path:
    """Two subspaces at two radii."""
    points = [{"rho": r, "ratio": r / 2, "increase": r * r, "share": 0.5, "realised": 1.0} for r in (0.1, 1.0)]
    curves = [
        {"name": n, "neurons": 4, "weight_norm": 2.0, "gradient_share": 0.1, "by_rho": points, "by_ratio": points}
        for n in ("critical", "random")
    ]
    folder.mkdir(parents=True)
    write(folder / "sharpness.json", {"arguments": {"model": "m"}, "loss": 0.6, "pairs": 32, "curves": curves})
    return folder


def safety(path: Path) -> Path:
    """A result of `shapo evaluate --verdicts --benign`, with texts in places that a page must not quote."""
    group = bounded(0.25)
    success = {"harmbench": {"judge": "wildguard", **bounded(0.25, 0.5), "by_category": {"a": group, "b": group}}}
    agreement = {"judges": ["j", "k"], "kappa": 0.4, "low": 0.1, "high": 0.7, "agreement": 0.7, "n": 50, "left_out": 2}
    values = {"arguments": {"note": SECRET}, "answers": [SECRET], "attack_success": success, "agreement": agreement}
    write(path, {**values, "over_refusal": {"judge": "j", **group}})
    return path


def share(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 100}


def bounded(low: float, high: float | None = None) -> dict[str, float]:
    high = low if high is None else high
    counts = {"n": 8, "yes": round(8 * low), "no": round(8 * (1 - high)), "unreadable": round(8 * (high - low))}
    return {**counts, "low": low, "high": high, "interval_low": low / 2, "interval_high": (1 + high) / 2}


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))


def study(folder: Path) -> Path:
    """A study's report of two methods and one subspace at two radii."""
    folder.mkdir(parents=True)
    split = {"accuracy": 0.75, "margin": 0.1, "loss": 0.5}
    methods = [
        {"method": name, "noise": 0.4, "seeds": [0, 1], "ratio": None, "flips_fitted": 0.5}
        | dict.fromkeys(("test", "test_unseen", "test_attacks"), split)
        for name in ("dpo", "shapo-gradient")
    ]
    difference = {"method": "shapo-gradient", "baseline": "dpo", "noise": 0.4, "split": "test", "seeds": [0, 1]}
    rises = [{"space": "gradient", "rho": rho, "rise": [rho, rho / 2, 2 * rho]} for rho in (0.1, 1.0)]
    values = {"settings": {}, "figure1": rises, "benign": [], "methods": methods}
    write(folder / "report.json", {**values, "comparisons": [{**difference, "loss": [-0.02, -0.05, 0.01]}]})
    return folder
