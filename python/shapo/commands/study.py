"""Tries the method on a real aligned model: Figure 1, radii at matched loss increase, DPO and ShaPO under label noise.

--pairs is a folder of `shapo safety-pairs`. The work is a queue of jobs in the order of what decides most; each
finished job is one row in --output/rows. Stop it at any moment and call it again: it goes on with what is missing.
Call it several times at once, with the same --output, for several workers.

  study   methods x noise x seeds, Figure 1 in full: hours on a CPU
  cpu     methods x seeds at one noise rate, tuned on the selection split first, with their controls, the reward
          level, Figure 1 and refusals after training; then the head alone, other noise rates, more seeds: four hours
          of one core
  real    Figure 1 and one DPO and one ShaPO run at 30 % noise: half an hour on two cores

Writes to --output: rows/, report.md, report.html and report.json with plots, which `--report` makes anew from the rows
alone; the plan cpu also keeps the models of its first seed in models/.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.options import Group, option

SUMMARY = "try the method on a real model: a resumable queue of recorded jobs"


@dataclass(frozen=True)
class StudyOptions:
    """What is studied."""

    output: str = option("rows, scores and the report", metavar="FOLDER", fills=True)
    model: str | None = option(
        "the aligned model: a local folder or a hub name", None, metavar="NAME", reads=True, needs=("!report",)
    )
    pairs: str | None = option(
        "what `shapo safety-pairs` wrote", None, metavar="FOLDER", reads=True, needs=("!report",)
    )
    plan: str = option("see above", "study", choices=("study", "cpu", "real"), needs=("!report",))
    device: str = option("auto (cuda where there is one), cpu, cuda, cuda:1 ...", "auto", needs=("!report",))
    hours: float | None = option(
        "begin no further job after so many hours", None, parse=float, metavar="H", needs=("!report",)
    )
    tune_only: bool = option(
        "stop when the learning rate is chosen, before any test pair is looked at", False, needs=("!report",)
    )
    report: bool = option("write the report from the rows there are, and do no job", False)


REPLACES = (
    "rows",
    "locks",
    "scores",
    "work",
    "references",
    "models",
    "settings.json",
    "report.md",
    "report.json",
    "report.html",
    "figure1.png",
    "shares.png",
    "soft_labels.png",
    "comparisons.png",
)
SHARED = True  # by its own workers, which lock each job
OPTIONS = (Group(StudyOptions),)


def run(arguments: argparse.Namespace) -> None:
    import time
    from pathlib import Path

    from shapo.errors import UserError
    from shapo.storage.files import require_writable
    from shapo.study.jobs import selection_jobs, study_jobs
    from shapo.study.plan import PLANS
    from shapo.study.queue import run_queue
    from shapo.study.report import write_report
    from shapo.study.trial import Trial

    folder = require_writable(arguments.output, folder=True)
    plan = PLANS[arguments.plan]
    if not arguments.report:
        if not (arguments.model and arguments.pairs):
            raise UserError("a study needs --model and --pairs (or --report for the rows there are)")
        pairs = Path(arguments.pairs)
        trial = Trial(arguments.model, pairs, folder, plan, device=arguments.device)
        until = time.time() + 3600 * arguments.hours if arguments.hours else None
        jobs = study_jobs(trial.plan)
        jobs = selection_jobs(jobs) if arguments.tune_only else jobs
        run_queue(jobs, folder, trial, until=until, log=lambda line: print(line, flush=True))
    print(f"report: {write_report(folder)}")
