"""The torchrun example: killed, and resumed from a distributed checkpoint to the bit; on other numbers of ranks too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shapo_kernels as sk
from tests.support.ranks import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrun_fsdp2.py"


def launched(checkpoints, updates=6):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)),
            *("--checkpoints", str(checkpoints), "--updates", str(updates)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-4000:]
    return out


def contents(checkpoint, folder):
    """What a distributed checkpoint holds, read without the library and without ranks."""
    dcp_to_torch_save(checkpoint, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)["training"]


def leaves(tree, at=()):
    if isinstance(tree, dict):
        return {place: leaf for key, value in tree.items() for place, leaf in leaves(value, (*at, key)).items()}
    if isinstance(tree, (list, tuple)):
        return leaves(dict(enumerate(tree)), at)
    return {at: tree}


def assert_same_bits(found, expected):
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        assert torch.equal(found[place], value) if isinstance(value, torch.Tensor) else found[place] == value, place


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of a run that was killed after them: after update 3, in the middle of an interval, and after update 6."""
    folder = tmp_path_factory.mktemp("run")
    killed = launched(folder, updates=10**6)
    try:
        deadline = time.monotonic() + 100
        while not (folder / "6" / ".metadata").exists():
            assert killed.poll() is None, killed.communicate()[1][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        killed.terminate()  # torchrun passes it on to its ranks, which have no say in it
        killed.communicate(timeout=60)
    return folder


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(checkpoints, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoints / "3", run / "3")  # of the later ones, the last may have been under way
    printed = finished(launched(run))
    assert "update 3" not in printed
    assert "update 4" in printed
    assert_same_bits(contents(run / "6", tmp_path), contents(checkpoints / "6", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_on_another_number_of_ranks_the_state_is_the_same_to_the_bit_and_training_goes_on_alike(
    checkpoints, tmp_path, world
):
    case = {"checkpoint": str(checkpoints / "3"), "updates": 6}
    (results,) = run_ranks(tmp_path, world, [case], "rank_checkpoint.py")
    loaded, trained = results[0]  # the whole state is gathered on the first rank
    assert_same_bits(loaded, contents(checkpoints / "3", tmp_path))
    assert loaded["shapo"]["updates"] == 3
    expected = contents(checkpoints / "6", tmp_path)
    assert trained["shapo"]["updates"] == 6
    for part in ("model", "optimizer"):
        found = leaves(trained[part])
        for place, value in leaves(expected[part]).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[place], value, rtol=1e-11, atol=1e-13)
            else:
                assert found[place] == value


def test_the_step_that_creates_the_state_to_load_into_is_no_update():
    model = torch.nn.Linear(4, 2)
    for interval in (1, 2):
        base = torch.optim.AdamW(model.parameters(), lr=0.1)
        opt = sk.ShaPOOptimizer(base, model, sk.Subspace({"weight": [1]}), rho=0.1, interval=interval)
        before = [p.detach().clone() for p in model.parameters()]
        assert get_optimizer_state_dict(model, opt)["state"]["weight"]["exp_avg"].count_nonzero() == 0
        assert opt.updates == 0
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_first_update_at_learning_rate_zero_is_counted():
    model = torch.nn.Linear(4, 2)
    base = torch.optim.AdamW(model.parameters(), lr=0.0)
    opt = sk.ShaPOOptimizer(base, model, sk.Subspace({"weight": [1]}), rho=0.1, interval=2)
    model(torch.randn(3, 4)).sum().backward()
    opt.step()
    assert opt.updates == 1


def test_the_two_parts_of_a_state_load_as_the_whole_does():
    model = torch.nn.Linear(4, 2)
    options = {"rho": (0.1, 0.2), "norm": "none", "interval": 3}
    opts = [
        sk.ShaPOOptimizer(torch.optim.AdamW(model.parameters()), model, sk.Subspace({"weight": [1]}), **options)
        for _ in range(2)
    ]
    model(torch.randn(3, 4)).sum().backward()
    opts[0].step()
    opts[1].base.load_state_dict(opts[0].base.state_dict())
    assert opts[1].updates == 0
    opts[1].load_shapo_state_dict(opts[0].shapo_state_dict())
    assert opts[1].updates == 1
    assert_same_bits(opts[1].state_dict(), opts[0].state_dict())
    with pytest.raises(ValueError, match="version 7: expected 1"):
        opts[1].load_shapo_state_dict({**opts[0].shapo_state_dict(), "version": 7})
