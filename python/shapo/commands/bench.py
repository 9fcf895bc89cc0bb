"""A short benchmark of two operators on this machine: the subspace update and the column cosine, every backend against
eager PyTorch.

Each contender is first checked against the others; then they take turns, so that what else the machine does falls on
all of them, and the medians are compared.  The layers are more than the caches hold by default.  The benchmark suite of
the repository measures more; this one answers "is the fast path in use here, and what is it worth".
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.commands import common
from shapo.options import Group, option, positive_int, seed_number

SUMMARY = "operator microbenchmark on this machine"


@dataclass(frozen=True)
class BenchOptions:
    """Sizes of the benchmark."""

    output: str = option("JSON file of the results", "bench.json", metavar="FILE", writes=True)
    layers: int = option("number of weights", 8, parse=positive_int, metavar="N")
    hidden: int = option("rows of a weight, the length of a neuron", 2048, parse=positive_int)
    intermediate: int = option("columns of a weight, its neurons", 3072, parse=positive_int)
    percent: float = option("share of the neurons in the subspace, in (0, 100]", 1.0)
    dtype: str = option("of the weights", "float32", choices=("float32", "bfloat16"))
    device: str = option("auto (cuda where there is one), cpu, cuda ...", "auto")
    repeats: int = option("timed turns of each contender", 9, parse=positive_int, metavar="N")
    seed: int = option("of weights and selection", 0, parse=seed_number)


OPTIONS = (Group(BenchOptions), common.QUIET)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from shapo.bench import require_memory, run_benchmarks
    from shapo.errors import UserError
    from shapo.models.loading import device_of
    from shapo.storage.files import require_writable, write_json
    from shapo.tables import table
    from shapo.versions import versions

    if not 0 < arguments.percent <= 100:
        raise UserError(f"--percent is {arguments.percent}, but a share in (0, 100] is expected")
    require_writable(arguments.output)
    require_memory(arguments.layers, arguments.hidden, arguments.intermediate, device_of(arguments.device))
    result = run_benchmarks(
        layers=arguments.layers,
        hidden=arguments.hidden,
        intermediate=arguments.intermediate,
        percent=arguments.percent,
        dtype=getattr(torch, arguments.dtype),
        device=device_of(arguments.device),
        repeats=arguments.repeats,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    for name, rows in result["operators"].items():
        fastest_eager = min(row["median_ms"] for row in rows if row["eager"])
        print(f"\n{name}")
        lines = [
            (
                row["name"],
                f"{row['median_ms']:.3f}",
                f"{row['p20_ms']:.3f}",
                f"{row['p80_ms']:.3f}",
                f"{fastest_eager / row['median_ms']:.2f}x",
            )
            for row in rows
        ]
        print(table(("contender", "median ms", "p20", "p80", "speed against the best eager"), lines))
    write_json(arguments.output, {"arguments": vars(arguments), "versions": versions(), **result})
    print(f"\nwritten: {arguments.output}")
