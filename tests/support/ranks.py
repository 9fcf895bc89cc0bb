"""Gloo processes for the tests. One group of them runs a list of cases: starting Python takes longer than they do.

All groups of a test run are forked from one process, which keeps what their scripts import.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).parent
SECONDS = 500


def run_ranks(folder, world, cases, script="rank_cases.py"):
    """What each rank saved: for every case, in order, a list with one entry for each rank."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world)}
    environment["LOCAL_WORLD_SIZE"] = str(world)  # Accelerate would ask for an address, but they meet in a file
    started = {"script": str(HERE / script), "world": world, "folder": str(folder), "environment": environment}
    forks = _forking()
    forks.stdin.write(json.dumps(started) + "\n")
    forks.stdin.flush()
    group = int(forks.stdout.readline())
    try:
        ended, _, _ = select.select([forks.stdout], [], [], SECONDS)
        assert ended, f"{script} has not ended after {SECONDS} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # it, and the ranks where one of them is left
        code = int(forks.stdout.readline())
    assert code == 0, (folder / "errors").read_text()[-6000:]
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in range(world)), strict=True))


@functools.cache
def _forking():
    """The process that groups are forked from."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ranks.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    return process


def serve():
    """Forks a group for each line of the input: prints its number when it has started, its exit code when it ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        asked = json.loads(line)
        os.environ.clear()
        os.environ.update(asked["environment"])
        failed = _import(asked["script"])
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number, name in ((1, os.devnull), (2, Path(asked["folder"]) / "errors")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
            if failed:
                sys.stderr.write(failed)
                sys.stderr.flush()
                os._exit(1)
            os._exit(fork_ranks(asked["script"], asked["world"], asked["folder"]))
        print(pid, file=out, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=out, flush=True)


def fork_ranks(script, world, folder):
    """Forks a process a rank, so that they share what has been imported, which takes longer than their cases do.

    They leave without the interpreter's end, where gloo's threads may abort on a connection that another rank closed.
    Returns the exit code: 0 where all of them ran to their end.
    """
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            sys.argv = [script, str(rank), str(world), folder]
            code = 1
            try:
                runpy.run_path(script, run_name="__main__")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        ranks.append(pid)
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status != 0 and not failed:
            failed = 1
            for other in ranks:  # they would wait for it
                os.kill(other, signal.SIGTERM)
    return failed


def on_rank(run):
    """The other side: call `run(case)` for each case in the process that was started, and save what it returns."""
    import torch.distributed as dist

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder / 'store'}")
    torch.save([run(case) for case in json.loads((folder / "cases.json").read_text())], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _import(script):
    """Imports what a script does, once for all ranks, and what it names that is imported later. Returns the error."""
    try:
        for late in runpy.run_path(script, run_name="imported").get("LATE_IMPORTS", ()):
            with contextlib.suppress(ImportError):
                importlib.import_module(late)
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    serve()
