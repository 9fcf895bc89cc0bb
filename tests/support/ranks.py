"""Gloo processes for the tests. One group of them runs a list of cases: starting Python takes longer than they do."""

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).parent


def run_ranks(folder, world, cases, script="rank_cases.py"):
    """What each rank saved: for every case, in order, a list with one entry for each rank."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world)}
    environment["LOCAL_WORLD_SIZE"] = str(world)  # Accelerate would ask for an address, but they meet in a file
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ranks.py"), str(HERE / script), str(world), str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        error = process.communicate(timeout=500)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, and the ranks where one of them is left
    assert process.returncode == 0, error[-6000:]
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in range(world)), strict=True))


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


if __name__ == "__main__":
    script_, world_, folder_ = sys.argv[1:]
    # What it imports, once for all ranks; libraries that import more when they are first used are named there.
    for late in runpy.run_path(script_, run_name="imported").get("LATE_IMPORTS", ()):
        with contextlib.suppress(ImportError):
            importlib.import_module(late)
    sys.exit(fork_ranks(script_, int(world_), folder_))
