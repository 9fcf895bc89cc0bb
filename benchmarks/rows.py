"""What a benchmark leaves behind: rows of timings taken in turn, and the machine they were taken on.

A file under `benchmarks/results/` is one run, `{"environment": …, "rows": [...]}`; `report.py` tabulates it.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, the variants taken in turn: a machine whose speed drifts slows all of them alike."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], ours: str) -> dict[str, float]:
    """How many times longer each variant takes than `ours`: the median over the rounds, round by round."""
    return {
        name: statistics.median(other / mine for other, mine in zip(times, seconds[ours], strict=True))
        for name, times in seconds.items()
    }


def row(suite: str, case: str, variant: str, seconds: list[float], **columns: Any) -> dict[str, Any]:
    """One variant's timings in milliseconds; `columns` such as dtype, shape, bytes (moved), extra_bytes."""
    ordered = sorted(seconds)
    percentile = lambda p: 1e3 * ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))]  # noqa: E731
    found = {
        "suite": suite,
        "case": case,
        "variant": variant,
        "p20_ms": percentile(0.2),
        "p50_ms": 1e3 * statistics.median(seconds),
        "p80_ms": percentile(0.8),
        "rounds": len(seconds),
        **columns,
    }
    if "bytes" in columns:
        found["gb_per_s"] = columns["bytes"] / statistics.median(seconds) / 1e9
    return found


def environment() -> dict[str, Any]:
    """Commit, date, versions and hardware."""
    found = {
        "commit": _commit(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "transformers", "liger_kernel", "cut_cross_entropy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def write(
    name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, measured_in: dict[str, Any] | None = None
) -> Path:
    """Write one run's rows to `<folder>/<name>.json`; `measured_in` is another machine's :func:`environment`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": measured_in or environment(), "rows": rows}, indent=1) + "\n")
    return path


def add(
    name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, measured_in: dict[str, Any] | None = None
) -> Path:
    """As :func:`write`, beside the rows of other cases measured on the same machine with the same versions.

    For suites whose cases take minutes each and are measured one by one; a case is always one run. Rows of an earlier
    run carry its commit and date.
    """
    path, here, cases = folder / f"{name}.json", measured_in or environment(), {}
    if path.exists():
        earlier = json.loads(path.read_text())
        then = earlier["environment"]
        if _same_machine(then, here):
            measured = {name: then[name] for name in ("commit", "date") if name in then}
            cases = _by_case([{**measured, **row} for row in earlier["rows"]])
    cases |= _by_case(rows)
    return write(name, [row for case in cases.values() for row in case], folder, here)


def _same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether rows may stand in one table: hardware and versions agree, of those that both name."""
    apart = {"commit", "date", "copy_gb_per_s", "bf16_tflop_per_s"}
    return all(one[name] == other[name] for name in (one.keys() & other.keys()) - apart)


def _by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {case: [row for row in rows if row["case"] == case] for case in dict.fromkeys(row["case"] for row in rows)}


def _commit() -> str:
    """The commit that is measured, marked where sources differ from it; rows and tables being written are none."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return run.stdout.strip()

    sources = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)*.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
