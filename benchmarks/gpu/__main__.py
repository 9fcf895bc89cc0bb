"""One command for a machine with a GPU: build, checks, compute-sanitizer, timings, everything into one folder.

    python -m benchmarks.gpu                  # into runs/gpu; under 9 minutes
    python -m benchmarks.gpu --dry-run        # the same code on the CPU, in small shapes: its numbers mean nothing

Writes ``steps.json`` (what passed, failed or was skipped, and why), the rows of each suite as ``benchmarks.report``
reads them, and the output of every command that it ran. Exits with 1 where a check failed; a backend with a failed
check is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]

BUDGET_S = 520.0
BUILD = """
import pathlib, sys
sys.path.insert(0, "tools")
import native_build
native_build.build_libraries(pathlib.Path("shapo_kernels"))
"""
BUILD_S, SANITIZER_S = 200.0, 75.0


class Steps:
    """The record of a run; a step that raises is a failed one, and the run goes on."""

    def __init__(self, folder: Path, budget: float) -> None:
        self.folder, self.deadline = folder, time.monotonic() + budget
        self.found: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        entry: dict[str, Any] = {"step": name, "status": "passed"}
        start = time.monotonic()
        try:
            yield entry
        except Exception as error:
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
            (self.folder / f"{name.replace(' ', '_').replace(',', '')}.txt").write_text(traceback.format_exc())
        entry["seconds"] = round(time.monotonic() - start, 2)
        self.found.append(entry)
        print(f"{entry['status']:8} {entry['seconds']:7.1f} s  {name}  {entry.get('reason', '')}", flush=True)
        (self.folder / "steps.json").write_text(json.dumps(self.found, indent=1) + "\n")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def command(self, name: str, command: Sequence[str | Path], limit: float, **variables: str) -> str:
        """Run a command, keep its output in the folder, and return it.

        Raises:
            RuntimeError: it failed. subprocess.TimeoutExpired: it took longer than ``limit``, or than is left.
        """
        path = self.folder / f"{name}.log"
        with path.open("w") as log:
            run = subprocess.run(
                list(map(str, command)),
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, min(limit, self.left())),
                check=False,
            )
        if run.returncode:
            raise RuntimeError(f"exit code {run.returncode}, see {path.name}")
        return path.read_text()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="the folder to write into")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU backend, in small shapes")
    parser.add_argument("--no-build", action="store_true", help="take the libraries that are there")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each variant")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device: use --dry-run to run the same code on the CPU")
    options.output.mkdir(parents=True, exist_ok=True)
    steps = Steps(options.output, BUDGET_S)
    if not (options.dry_run or options.no_build):
        with steps.step("build"):
            major, minor = torch.cuda.get_device_capability()
            architectures = os.environ.get("SHAPO_CUDA_ARCHS") or f"{major}{minor}-real"
            steps.command("build", [sys.executable, "-c", BUILD], BUILD_S, SHAPO_CUDA_ARCHS=architectures)

    # Imported now: the libraries that were just built are loaded with the package.
    from benchmarks import rows
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.suites import SUITES

    device = torch.device("cpu" if options.dry_run else "cuda")
    healthy = run_checks(steps, device)
    if not options.dry_run:
        sanitize(steps, healthy)
    rounds = 3 if options.dry_run else options.rounds
    bench = Bench(device, small=options.dry_run, rounds=rounds, deadline=steps.deadline)
    bench.backends = [name for name in bench.backends if name in healthy]
    with torch.no_grad():
        for suite in SUITES:
            with steps.step(f"time {suite.__name__}") as entry:
                if not bench.backends or steps.left() <= 0:
                    entry |= {
                        "status": "skipped",
                        "reason": "no backend passed its checks" if steps.left() > 0 else "no time is left",
                    }
                    continue
                suite(bench)
    for name in dict.fromkeys(found["suite"] for found in bench.rows):
        timed = [found for found in bench.rows if found["suite"] == name and "refused" not in found]
        refused = [found for found in bench.rows if found["suite"] == name and "refused" in found]
        rows.write(name if not options.dry_run else f"dry_run_{name}", timed, options.output)
        if refused:
            (options.output / f"{name}_refused.json").write_text(json.dumps(refused, indent=1) + "\n")
    failed = [entry["step"] for entry in steps.found if entry["status"] == "failed"]
    print(f"{options.output}: {'all passed' if not failed else 'FAILED: ' + ', '.join(failed)}")
    return 1 if failed else 0


def run_checks(steps: Steps, device: torch.device) -> list[str]:
    """Run every check for every backend of the device, and return the backends that passed all of theirs."""
    from benchmarks.gpu import checks
    from shapo_kernels import backends

    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    wanted = checks.ANYWHERE + (checks.ON_GPU if device.type == "cuda" else ())
    healthy = []
    for name in names:
        if name not in backends.available():
            with steps.step(f"checks, {name}") as entry:
                entry |= {"status": "skipped", "reason": "the backend is not available"}
            continue
        before = len(steps.found)
        for check in wanted:
            with steps.step(f"{check.__name__}, {name}") as entry, backends.use(name):
                torch.manual_seed(0)
                try:
                    check(device)
                except checks.SkipCheckError as reason:
                    entry |= {"status": "skipped", "reason": str(reason)}
        if all(entry["status"] != "failed" for entry in steps.found[before:]):
            healthy.append(name)
    return healthy


def sanitize(steps: Steps, names: Sequence[str]) -> None:
    """Watch the small checks with compute-sanitizer, where it is installed: bad accesses and races."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    code = (
        "import sys, torch\n"
        "from benchmarks.gpu import checks\n"
        "from shapo_kernels import backends\n"
        "with backends.use(sys.argv[1]):\n"
        "    for check in checks.SANITIZED: check(torch.device('cuda'))\n"
    )
    for name in names:
        for kind in ("memcheck", "racecheck"):
            with steps.step(f"{kind}, {name}") as entry:
                if tool is None:
                    entry |= {"status": "skipped", "reason": "compute-sanitizer is not installed"}
                    continue
                command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", code, name]
                try:
                    # PyTorch's allocator hides what lies outside of a tensor but inside its block.
                    steps.command(
                        f"{kind}_{name}", command, SANITIZER_S, PYTHONPATH=str(ROOT), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
                    )
                except subprocess.TimeoutExpired as error:
                    entry |= {"status": "skipped", "reason": f"not done in {error.timeout:.0f} s"}


if __name__ == "__main__":
    sys.exit(main())
