"""Generated command lines over all commands: no traceback, no crash, no silent success, nothing overwritten.

    python tests/fuzz/run.py --cases 3000 --seed 1

Every case is one command line, or one damaged file, made from the seed and the number of the case alone; `--only N`
repeats case N and shows what it printed. All run in children of `--jobs` processes by fork, which have done each
command once before, so that nothing is imported for a case.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from tests.fuzz.lines import OUTPUTS, Case, damage, make_case, told  # noqa: E402 (found once the path is set)

SECONDS = 60  # of the processor
WALL_SECONDS = 600  # for what waits
MEMORY = 16 << 30


def judge(
    case: Case, code: int, error: str, before: dict[str, str], after: dict[str, str], left: list[str]
) -> str | None:
    """What is wrong with how a case ended; None where nothing is."""
    if code < 0:
        return "ran too long" if -code in (signal.SIGKILL, signal.SIGXCPU) else f"died of signal {-code}"
    if "Traceback" in error:
        return "a traceback: " + error.strip().splitlines()[-1]
    if code not in (0, 2):
        return f"exit code {code}"
    lines = [line for line in error.splitlines() if line.startswith("shapo: error: ")]
    if code == 2 and len(lines) != 1:
        return f"exit code 2 with {len(lines)} error lines"
    if code == 0 and case.must_fail:
        return f"a silent success: {case.must_fail}"
    changed = sorted(name for name, digest in before.items() if after.get(name) != digest)
    if changed and not ("--resume" in case.arguments and all(name.startswith("run/") for name in changed)):
        return f"{changed[0]} was overwritten"
    return f"{left[0]} was left behind" if left else None


def run_case(case: Case, whole: Path, world: Path) -> tuple[str | None, str]:
    """Runs one case in `world`, a copy of the files of `whole`; what is wrong, and what it printed."""
    with tempfile.TemporaryDirectory(dir=whole.parent) as name:
        place = Path(name)
        _copy(whole, world)
        for one in case.damage:
            damage(world, one)
        before, printed = read_by(case, digests(world), world), place / "printed"
        code = in_child(lambda: _command(case.arguments), place / "work", printed)
        error = printed.read_text(errors="replace")
        left = [str(path) for folder in (world, place) for path in folder.rglob(".shapo-*")]
        return judge(case, code, error, before, digests(world), left), error


def _copy(whole: Path, world: Path) -> None:
    shutil.rmtree(world, ignore_errors=True)
    shutil.copytree(whole, world)
    config = world / "adapter" / "adapter_config.json"  # tells where its model lies
    config.write_text(config.read_text().replace(str(whole), str(world)))


def _command(arguments: Sequence[str]) -> int:
    from shapo.cli import main

    try:
        return main(arguments)
    except SystemExit as leave:
        return int(leave.code or 0)


def in_child(call: Callable[[], int], folder: Path, printed: Path) -> int:
    """The exit code of `call` in a child with a folder of its own; negative for a signal."""
    import resource

    import torch

    folder.mkdir()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            handle = os.open(printed, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.alarm(WALL_SECONDS)
            # Torch makes its thread pool anew at its first use in a child. Two threads at once can find none.
            torch.set_num_threads(1)
            used = int(time.process_time())
            resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + 2 * SECONDS))
            code = call()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def read_by(case: Case, files: dict[str, str], world: Path) -> dict[str, str]:
    """Those of the files that a command line reads: another file is replaced where --output names it."""
    after = zip(["", *case.arguments], case.arguments, strict=False)
    read = [
        Path(part.partition(":0")[0]) for before, part in after if before not in OUTPUTS and part.startswith(str(world))
    ]
    return {
        name: d for name, d in files.items() if any(path in ((world / name), *(world / name).parents) for path in read)
    }


def digests(folder: Path) -> dict[str, str]:
    """Name -> digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(cases: int, seed: int, *, only: int | None = None, jobs: int = 2) -> Iterator[tuple[Case, str | None, str]]:
    """Runs cases and yields each, in order, with what is wrong with it, and what it printed."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # a name that is no file would be looked for there
    import datasets  # noqa: F401 (what such a name has imported)
    import torch

    torch.set_num_threads(1)
    from tests.fuzz import world

    # In memory where that is possible: hundreds of copies of the same small files.
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as name:
        whole = Path(name) / "whole"
        world.make(whole)
        world.do_each_once(whole)
        gc.collect()
        gc.freeze()  # what a child does not touch it need not copy
        numbers = range(cases) if only is None else [only]
        try:
            with multiprocessing.get_context("fork").Pool(jobs) as pool:
                yield from pool.imap(_one, [(number, seed, str(whole)) for number in numbers])
        finally:
            gc.unfreeze()


def _one(what: tuple[int, int, str]) -> tuple[Case, str | None, str]:
    number, seed, name = what
    whole = Path(name)
    world = whole.with_name(f"now-{os.getpid()}")
    case = make_case(number, seed, world)
    return case, *run_case(case, whole, world)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="N", help="run case N alone, and show what it printed")
    asked = parser.parse_args(arguments)
    started, failures = time.monotonic(), 0
    for case, wrong, printed in run(asked.cases, asked.seed, only=asked.only, jobs=asked.jobs):
        if wrong is not None or asked.only is not None:
            failures += wrong is not None
            print(f"case {case.number}: {wrong}\n  {told(case)}", flush=True)
        if asked.only is not None:
            print(printed)
    print(f"{failures} failures, {time.monotonic() - started:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
