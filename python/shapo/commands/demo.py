"""The whole method on generated data: a small Llama from random weights, SFT, probe, selection, then DPO and ShaPO
under flipped labels.

Takes some minutes on two cores and needs no download.  Prints one table (preference accuracy, clean loss, share of
flipped labels memorised, loss increase under perturbation, rho / ||W_S||, time an update) and writes to --output:
report.md, report.html, report.json, PNG plots, the data, the subspaces, every method's model and metrics, and the
final model (model/), which `from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from shapo.commands import common
from shapo.options import Group, option, positive_int, seed_number

SUMMARY = "the whole method on generated data, in minutes on a CPU"


@dataclass(frozen=True)
class DemoOptions:
    """Size and seed of the demo."""

    output: str = option("where everything is written", "runs/demo", metavar="FOLDER", fills=True)
    size: str = option("small: seconds, too little to learn from", "full", choices=("full", "small"))
    seed: int = option("of data, weights, order, flips and random subspaces", 0, parse=seed_number)
    jobs: int | None = option(
        "methods trained side by side", None, parse=positive_int, metavar="N", absent="a core each, 4 at most"
    )
    device: str = option("auto (cuda where there is one), cpu, cuda ...", "auto")


REPLACES = (
    "model",
    "report.json",
    "report.md",
    "report.html",
    "*.png",
    "data",
    "sft",
    "probe",
    "methods",
    "subspaces",
    "reward_model",
    "rewards.safetensors",
)
OPTIONS = (Group(DemoOptions), common.QUIET)


def run(arguments: argparse.Namespace) -> None:
    from shapo.models.loading import device_of
    from shapo.storage.files import require_writable

    output = require_writable(arguments.output, folder=True)
    device = device_of(arguments.device)

    from shapo.demo import report
    from shapo.demo.run import run_demo
    from shapo.demo.settings import methods

    jobs = min(arguments.jobs, len(methods())) if arguments.jobs else (1 if device.type == "cuda" else min(4, _cores()))
    options = {"size": arguments.size, "seed": arguments.seed, "device": str(device), "progress": not arguments.quiet}
    try:
        results = run_demo(output, jobs=jobs, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("an unfinished demo is not resumed, the next one begins anew") from None
    print("\n" + report.plain_table(results))
    print(f"\n{results['seconds']:.0f} s. What the columns mean and what they do not show: {output / 'report.md'}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
