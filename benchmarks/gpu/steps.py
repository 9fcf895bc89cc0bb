"""The steps of a run, in order, and what each does in its process.

A step that returns has passed. One that raises has failed, and SkipCheckError says that it could not be tried. What a
step finds is written at once. The parent of the processes reads this module: it imports nothing that touches CUDA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.suites import PUBLISHED, SUITES, THROUGH_THE_HOST, Suite

ROOT = Path(__file__).resolve().parents[2]
# The families of checks; those that compile, or take memory, come after the timings.
# `OTHER` are those in which the other backend differs from the default.
EARLY = ("subspace", "neurons", "cosine", "logps", "head", "updates", "streams")
LATE = ("large", "compiled")
OTHER = ("subspace", "updates", "streams")


@dataclass(frozen=True)
class Run:
    """What the steps are told: where to write, on what to run, and until when."""

    folder: Path
    dry: bool
    rounds: int
    deadline: float
    commit: str | None = None

    @property
    def names(self) -> tuple[str, str]:
        """What serves by default is checked and timed first, another backend in the second half.

        The default is CUDA C++ for the subspace update and Triton for log-probabilities.
        """
        return ("default", "reference" if self.dry else "triton")

    def append(self, file: str, entry: dict[str, Any]) -> None:
        """A line of JSON, written through: what is found is kept, whatever happens next."""
        with (self.folder / file).open("a") as lines:
            lines.write(json.dumps(entry) + "\n")

    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda")


@dataclass(frozen=True)
class Step:
    """`work` is called in the step's process with the run and the healthy backends.

    `limit` is in seconds, and `least` what must be left of the budget for it to be begun. A failed step takes
    `backend` out of all later steps that need one of its `families`.
    """

    name: str
    work: Callable[[Run, Sequence[str]], None]
    limit: float
    least: float = 5.0
    backend: str | None = None
    families: tuple[str, ...] = ()
    later: bool = False


def plan(run: Run) -> Iterator[Step]:
    """All steps: checks and timings of the first backend, then of the other, then what is slow or may hang."""
    first, other = run.names
    yield Step("device", _device, 60)
    yield Step("build", _build, 150)
    yield from (_check(first, family, 40) for family in EARLY)
    yield from (_time(suite, later=False) for suite in SUITES)
    yield from (_check(other, family, 60) for family in OTHER)
    yield from (_time(suite, later=True) for suite in SUITES if suite.later)
    yield from (_check(name, family, 60) for family in LATE for name in run.names)
    yield from (_time(suite, later=True) for suite in (THROUGH_THE_HOST, PUBLISHED))
    yield Step("pytest", _pytest, 90, least=25)
    yield from (_sanitizer(tool, name) for tool in ("memcheck", "racecheck") for name in run.names)


def _check(backend: str, family: str, limit: float) -> Step:
    def work(run: Run, healthy: Sequence[str]) -> None:
        run_checks(run, backend, family)

    return Step(f"check {family}, {backend}", work, limit, backend=backend, families=(family,))


def _time(suite: Suite, *, later: bool) -> Step:
    def work(run: Run, healthy: Sequence[str]) -> None:
        run_suite(run, suite, healthy, later=later)

    half = ", the rest" if later and suite.later else ""
    return Step(f"time {suite.name}{half}", work, suite.limit, suite.least, families=suite.needs, later=later)


def _sanitizer(tool: str, backend: str) -> Step:
    def work(run: Run, healthy: Sequence[str]) -> None:
        sanitize(run, tool, backend)

    return Step(f"{tool}, {backend}", work, 60, least=20, backend=backend)


# -- what they do


def _device(run: Run, healthy: Sequence[str]) -> None:
    """Hardware, versions and the two ceilings, into environment.json."""
    import torch

    from benchmarks.rows import environment

    if not run.dry and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device: --dry-run runs the same code on the CPU")
    device, elements, side = run.device(), 2**16 if run.dry else 2**29, 64 if run.dry else 8192
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = _seconds(lambda: a @ b, device)
    found = {
        **environment(),
        "dry_run": run.dry,
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e9,
        "bf16_tflop_per_s": 2 * side**3 / product / 1e12,
    }
    if run.commit:
        found["commit"] = run.commit
    (run.folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found, flush=True)


def _seconds(run: Callable[[], Any], device: Any) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(5):
        wait()
        start = time.perf_counter()
        for _ in range(10):
            run()
        wait()
        best = min(best, (time.perf_counter() - start) / 10)
    return best


def _build(run: Run, healthy: Sequence[str]) -> None:
    """The compiled libraries, in place, for this device alone, where those that are here cannot be used.

    Raises:
        CalledProcessError: they do not compile. SkipCheckError: there is nothing to do.
    """
    import torch

    from benchmarks.gpu.checks import SkipCheckError
    from shapo_kernels import backends, native

    if run.dry or "cuda" in backends.available():
        raise SkipCheckError(f"the library is here, for {native.cuda_architectures() or 'the CPU'}")
    print(native.problems, flush=True)
    capability = torch.cuda.get_device_capability()
    architectures = os.environ.get("SHAPO_CUDA_ARCHS") or f"{capability[0]}{capability[1]}-real"
    code = (
        "import pathlib, sys; sys.path.insert(0, 'tools'); import native_build; "
        "native_build.build_libraries(pathlib.Path('shapo_kernels'))"
    )
    environment = {**os.environ, "SHAPO_CUDA_ARCHS": architectures}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def run_checks(run: Run, backend: str, family: str) -> None:
    """A family's checks by one backend; each is written down, and one that fails does not keep the others from running.

    Raises:
        AssertionError: one failed. SkipCheckError: none could be tried.
    """
    import torch

    from benchmarks.gpu.bench import DEFAULT, using
    from benchmarks.gpu.checks import SkipCheckError
    from benchmarks.gpu.families import ANYWHERE, FAMILIES
    from shapo_kernels import backends

    if backend not in (DEFAULT, *backends.available()):
        raise SkipCheckError("the backend is not available")
    failed, tried = [], 0
    for check in FAMILIES[family]:
        if run.dry and check not in ANYWHERE:
            continue
        entry = {"step": f"check {family}, {backend}", "check": check.__name__, "status": "passed"}
        torch.manual_seed(0)
        try:
            with using(backend):
                check(run.device())
                if not run.dry:
                    torch.cuda.synchronize()
            tried += 1
        except SkipCheckError as reason:
            entry |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc()
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
            failed.append(check.__name__)
        run.append("steps.jsonl", entry)
    if failed:
        raise AssertionError(", ".join(failed))
    if not tried:
        raise SkipCheckError("nothing here can be checked on this device")


def run_suite(run: Run, suite: Suite, healthy: Sequence[str], *, later: bool) -> None:
    """A suite's half by the healthy backends; rows are written as they are found.

    Raises:
        AssertionError: a result of ours was wrong. SkipCheckError: no backend may be timed, or no time was left.
    """
    import torch

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.checks import SkipCheckError

    if not healthy:
        raise SkipCheckError("no backend passed its checks")
    # Where the first backend was not fit to be timed, the other has not had its turn with what was timed then.
    half = "first" if not later else "second" if healthy[0] == run.names[0] else "both"
    bench = Bench(
        run.device(),
        small=run.dry,
        rounds=run.rounds,
        deadline=min(run.deadline, time.monotonic() + 0.8 * suite.limit),
        backends=healthy,
        half=half,
        record=lambda row: run.append("rows.jsonl", row),
    )
    with torch.no_grad():
        suite.function()(bench)
    if bench.wrong():
        raise AssertionError("; ".join(bench.wrong()))
    if not any("p50_ms" in row for row in bench.rows):
        raise SkipCheckError("no time was left")


def _pytest(run: Run, healthy: Sequence[str]) -> None:
    """The tests that need a GPU; in a dry run they are collected."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/cuda/test_gpu.py", "-p", "no:cacheprovider"]
    subprocess.run([*command, *(["--collect-only"] if run.dry else [])], cwd=ROOT, check=True)


def sanitize(run: Run, tool: str, backend: str) -> None:
    """The small checks under compute-sanitizer; in a dry run the first of them without it.

    Raises:
        CalledProcessError: it found something. SkipCheckError: it is not installed.
    """
    from benchmarks.gpu.checks import SkipCheckError

    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None and not run.dry:
        raise SkipCheckError("compute-sanitizer is not installed")
    code = (
        "import sys, torch\n"
        "from benchmarks.gpu.families import SANITIZED\n"
        "from benchmarks.gpu.bench import using\n"
        "with using(sys.argv[1]):\n"
        "    for check in SANITIZED[: int(sys.argv[3])]: check(torch.device(sys.argv[2]))\n"
    )
    watch = [] if run.dry else [str(found), "--tool", tool, "--error-exitcode", "9"]
    # PyTorch's allocator hides what lies outside of a tensor but inside its block.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*watch, sys.executable, "-c", code, backend, run.device().type, "1" if run.dry else "99"]
    subprocess.run(command, cwd=ROOT, env=variables, check=True)
