"""Reads what a run has left behind: a summary, and its rows put among the recorded ones.

python -m benchmarks.gpu.record runs/gpu                          # into benchmarks/results/gpu_<suite>.json
python -m benchmarks.report --gpu --into README.md                # then into the documents
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, add


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; none where it is missing. A last line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def summary(folder: Path) -> str:
    """A line for each row: what was timed, how long it took, how far it is from its floor and from ours."""
    lines = []
    case = None
    for row in read(folder / "rows.jsonl"):
        if row["case"] != case:
            case = row["case"]
            lines.append(f"{row['suite']}: {case}")
        lines.append(f"  {row['variant'][:46]:46} {_said(row)}")
    return "\n".join(lines)


def _said(row: dict[str, Any]) -> str:
    if "p50_ms" not in row:
        return f"REFUSED {row['refused']}"[:120] if "refused" in row else row.get("left_out", "")
    parts = [f"{row['p50_ms']:9.4f} ms"]
    formats = {
        "warm_ms": "warm {:.4f}", "times_ours": "x{:.2f} of ours", "ratio_to_plain": "x{:.3f} of plain",
        "of_floor": "floor x{:.2f}", "of_floor_64": "(64: x{:.2f})", "peak_gib": "peak {:.1f} GiB",
    }  # fmt: skip
    parts += [text.format(row[column]) for column, text in formats.items() if column in row]
    if row.get("extra_bytes"):
        parts.append(f"+{row['extra_bytes'] / 2**20:.0f} MiB")
    if row.get("timing", "graph") != "graph":
        parts.append(row["timing"])
    return "  ".join(parts)


def record(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Put a run's rows into `<results>/<suite>.json`, but for suites in which one of ours was refused.

    Raises:
        ValueError: a dry run, or one of an unknown or changed commit.
    """
    environment = json.loads((folder / "environment.json").read_text())
    if environment.get("dry_run") or not environment.get("gpu"):
        raise ValueError(f"{folder} is a dry run: its numbers mean nothing and are not recorded")
    if environment["commit"] == "unknown" or environment["commit"].endswith("-dirty"):
        raise ValueError(f"commit {environment['commit']!r}: run what is committed, with --commit where git is missing")
    found = read(folder / "rows.jsonl")
    wrong = {row["suite"] for row in found if "refused" in row and row["variant"].startswith("shapo_kernels")}
    for suite in sorted(wrong):
        print(f"{suite} is left out: a result of ours was wrong", file=sys.stderr)
    timed = [row for row in found if "p50_ms" in row and row["suite"] not in wrong]
    return [
        add(suite, _in_order(timed, suite), results, environment) for suite in dict.fromkeys(r["suite"] for r in timed)
    ]


def _in_order(rows: Sequence[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    """A suite's rows, case by case: variants of the second half stand with those of the first."""
    cases = dict.fromkeys(row["case"] for row in rows if row["suite"] == suite)
    return [row for case in cases for row in rows if row["suite"] == suite and row["case"] == case]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what python -m benchmarks.gpu wrote")
    for path in record(parser.parse_args(arguments).folder):
        print(path)


if __name__ == "__main__":
    main()
