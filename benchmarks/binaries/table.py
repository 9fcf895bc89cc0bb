"""Writes docs/gpu_kernels.md's tables: what every GPU kernel takes on every target, read from the compiled binaries.

`python -m benchmarks.binaries.table` compiles every Triton specialisation for every target and csrc/cuda for the
default architectures (some minutes; Triton keeps what it has compiled), and refuses to write where one spills or breaks
its limits. `--floors` writes the predicted and measured times alone, which is enough where rows have been recorded.
A fingerprint of the sources is written too, by which a test notices kernels that changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
from pathlib import Path

from benchmarks.binaries import aot, floors, nvcc
from benchmarks.report import between_markers

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "gpu_kernels.md"
FLOORS = ("<!-- floors -->", "<!-- /floors -->")
KERNELS = ("<!-- kernels -->", "<!-- /kernels -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floors", action="store_true", help="predicted and measured times alone")
    options = parser.parse_args()
    text = between_markers(DOCUMENT.read_text(), floors.table(), FLOORS)
    if not options.floors:
        head = f"Fingerprint of the sources: `{fingerprint()}`."
        text = between_markers(text, f"{head}\n\n{_triton_table()}\n\n{_cuda_table()}", KERNELS)
    DOCUMENT.write_text(text)


def fingerprint() -> str:
    """A digest of everything that the tables were made from."""
    modules = {spec.kernel.fn.__module__ for spec in aot.specialisations()} | {aot.tables.__name__}
    sources = [ROOT / f"{module.replace('.', '/')}.py" for module in modules]
    sources += [*(ROOT / "csrc" / "cuda").glob("*"), ROOT / "csrc" / "layers.h"]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _triton_table() -> str:
    specs = list(aot.specialisations())
    jobs = [(number, target) for target in aot.TARGETS for number in range(len(specs))]
    with multiprocessing.Pool(2) as pool:
        found = dict(zip(jobs, pool.starmap(_resources, jobs, chunksize=8), strict=True))
    problems = [
        problem
        for (number, target), resources in found.items()
        for problem in aot.violations(specs[number], target, resources)
    ]
    if problems:
        sys.exit("\n".join(problems))
    lines = [
        "### Triton",
        "",
        f"| kernel | specialisation | {' | '.join(aot.TARGETS)} |",
        f"|---|---|{'---|' * len(aot.TARGETS)}",
    ]
    for number, spec in enumerate(specs):
        cells = [_cell(found[number, target]) for target in aot.TARGETS]
        lines.append(f"| `{spec.kernel.__name__}` | {spec.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _resources(number: int, target: str) -> aot.Resources:
    return aot.compiled(list(aot.specialisations())[number], target)


def _cell(resources: aot.Resources) -> str:
    return f"{resources.registers} / {resources.shared} / {resources.spills} / {resources.widest}"


def _cuda_table() -> str:
    kernels = []
    for source in nvcc.SOURCES:
        compiled, warnings = nvcc.compile_source(source)
        spilling = [f"{k.architecture} {k.name}: {k.spills} bytes spilled" for k in compiled if k.spills]
        if warnings or spilling:
            sys.exit("\n".join([*warnings, *spilling]))
        kernels += compiled
    names = dict.fromkeys((k.source, k.name) for k in sorted(kernels, key=lambda k: (k.source, k.name)))
    found = {(k.source, k.name, k.architecture): f"{k.registers} / {k.shared} / {k.spills}" for k in kernels}
    lines = [
        "### CUDA C++",
        "",
        f"| source | kernel | {' | '.join(nvcc.ARCHITECTURES)} |",
        f"|---|---|{'---|' * len(nvcc.ARCHITECTURES)}",
    ]
    for file, name in names:
        cells = [found[file, name, architecture] for architecture in nvcc.ARCHITECTURES]
        lines.append(f"| {file} | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
