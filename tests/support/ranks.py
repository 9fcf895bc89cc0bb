"""Gloo processes for the tests. One group of them runs a list of cases: starting Python takes longer than they do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def run_ranks(folder, world, cases, script="rank_cases.py"):
    """What each rank saved: for every case, in order, a list with one entry for each rank."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["LOCAL_WORLD_SIZE"] = str(world)  # Accelerate would ask for an address, but they meet in a file
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(rank), str(world), str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, error in zip(ranks, errors, strict=True):
        assert process.returncode == 0, error[-4000:]
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in range(world)), strict=True))


def on_rank(run):
    """The other side: call ``run(case)`` for each case in the process that was started, and save what it returns."""
    import torch.distributed as dist

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder / 'store'}")
    torch.save([run(case) for case in json.loads((folder / "cases.json").read_text())], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
