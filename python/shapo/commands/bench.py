"""A short benchmark of two operators on this machine: the subspace update and the column cosine, every backend against
eager PyTorch.

Each contender is first checked against the others; then they take turns, so that what else the machine does falls on
all of them, and the medians are compared.  The layers are more than the caches hold by default.  The benchmark suite of
the repository measures more; this one answers "is the fast path in use here, and what is it worth".
"""

from __future__ import annotations

import argparse

from shapo.commands import common

SUMMARY = "operator microbenchmark on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="bench.json", metavar="FILE", help="JSON file of the results")
    parser.add_argument("--layers", type=common.positive_int, default=8, metavar="N", help="number of weights")
    parser.add_argument(
        "--hidden", type=common.positive_int, default=2048, help="rows of a weight, the length of a neuron"
    )
    parser.add_argument(
        "--intermediate", type=common.positive_int, default=3072, help="columns of a weight, its neurons"
    )
    parser.add_argument("--percent", type=float, default=1.0, help="share of the neurons in the subspace, in (0, 100]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda ...")
    parser.add_argument(
        "--repeats", type=common.positive_int, default=9, metavar="N", help="timed turns of each contender"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and selection")
    common.add_quiet_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from shapo.bench import run_benchmarks
    from shapo.errors import UserError
    from shapo.models.loading import device_of
    from shapo.storage.files import require_writable, write_json
    from shapo.tables import table
    from shapo.versions import versions

    if not 0 < arguments.percent <= 100:
        raise UserError(f"--percent is {arguments.percent}, but a share in (0, 100] is expected")
    require_writable(arguments.output)
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
