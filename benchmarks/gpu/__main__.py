"""One command for a machine with a GPU: checks of every kernel, timings, compute-sanitizer, into one folder.

    python -m benchmarks.gpu                       # into runs/gpu, at most four minutes
    python -m benchmarks.gpu --only head,logps     # the steps whose names have one of these words
    python -m benchmarks.gpu --list                # the steps in order
    python -m benchmarks.gpu --dry-run             # the same code on the CPU, in small shapes: its numbers mean nothing

Each step is a process in a session of its own. It is ended with all that it started when its time is up, and what it
has found by then is kept. Four files are written: `steps.jsonl` (what passed, failed or was skipped, and why),
`rows.jsonl` (the timings), `environment.json` and `log.txt` (what the steps printed). A backend with a failed
check, and a suite's variant with a wrong result, is not timed. Exits with 1 where a step failed.

`python -m benchmarks.gpu.record runs/gpu` puts the rows of a run among the recorded ones.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch  # once, before the processes are forked

from benchmarks.gpu.processes import run_apart
from benchmarks.gpu.record import summary
from benchmarks.gpu.steps import ROOT, Run, Step, plan
from benchmarks.gpu.suites import SUITES

FILES = ("steps.jsonl", "rows.jsonl", "environment.json", "log.txt")
SKIP = "SkipCheckError: "


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="the folder to write into")
    parser.add_argument("--only", default="", help="words of the steps to run, separated by commas")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for everything (240)")
    parser.add_argument("--rounds", type=int, default=20, help="timings of each variant (20)")
    parser.add_argument("--commit", help="what was checked out, where git cannot say it")
    parser.add_argument("--list", action="store_true", help="print the steps and run none")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small shapes")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    rounds = min(2, options.rounds) if options.dry_run else options.rounds
    run = Run(options.output, options.dry_run, rounds, start + options.budget, options.commit)
    if options.list:
        print("\n".join(step.name for step in plan(run)))
        return 0
    if run.dry:
        # In shapes this small, threads only wait for each other; the steps' processes inherit the number.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
        # Without CUDA nothing can be broken for a child: imported here, once, they are there in each.
        own = ("families", *dict.fromkeys(suite.module for suite in SUITES))
        for module in ("transformers.models.llama.modeling_llama", *(f"benchmarks.gpu.{name}" for name in own)):
            importlib.import_module(module)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (options.output / name).unlink(missing_ok=True)
    failed = go_through(run, [word.strip() for word in options.only.split(",") if word.strip()])
    print(summary(options.output))
    print(f"{time.monotonic() - start:.0f} s; {'all passed' if not failed else 'FAILED: ' + ', '.join(failed)}")
    return 1 if failed else 0


def go_through(run: Run, only: Sequence[str]) -> list[str]:
    """Run the steps, each apart, and return the names of those that failed."""
    failed: list[str] = []
    fit: dict[tuple[str, str], bool] = {}  # backend and family
    for step in plan(run):
        if only and step.name != "device" and not any(word in step.name for word in only):
            continue
        status, reason, seconds = _attempt(run, step, fit, unchecked=bool(only))
        run.append("steps.jsonl", {"step": step.name, "status": status, "reason": reason, "seconds": seconds})
        print(f"{status:7} {seconds:6.1f} s  {step.name}  {reason}", flush=True)
        if status == "failed":
            failed.append(step.name)
            if step.name == "device":
                break
        if step.backend is not None:
            fit |= {(step.backend, family): status == "passed" for family in step.families}
    return failed


def _attempt(run: Run, step: Step, fit: dict[tuple[str, str], bool], *, unchecked: bool) -> tuple[str, str, float]:
    """Status, reason and seconds of one step. `unchecked`: whether what was not checked may be timed."""
    left = run.deadline - time.monotonic()
    if left < step.least:
        return "skipped", f"{max(0.0, left):.0f} s were left", 0.0
    healthy = [name for name in run.names if all(fit.get((name, f), unchecked) for f in step.families)]
    given = healthy if step.later else healthy[:1]
    start = time.monotonic()
    reason = run_apart(functools.partial(step.work, run, given), min(step.limit, left), run.folder / "log.txt")
    status = "passed" if reason is None else "skipped" if reason.startswith(SKIP) else "failed"
    return status, (reason or "").removeprefix(SKIP), round(time.monotonic() - start, 2)


if __name__ == "__main__":
    sys.exit(main())
