"""Data-parallel ranks move along one direction: two gloo processes equal one (the synchronised part of S12)."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

WORKER = textwrap.dedent(
    """
    import os, sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import shapo_kernels as sk

    rank, ascent, sync, accumulate = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "1", int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2)).double()
    wrapped = DistributedDataParallel(model)
    subspace = sk.Subspace({"2.weight": [1, 4, 7]})
    opt = sk.ShaPOOptimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, subspace,
                            rho=0.4, ascent=ascent, sync=sync)
    generator = torch.Generator().manual_seed(7)
    for step in range(4):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        pieces = list(zip(x.chunk(2)[rank].chunk(accumulate), y.chunk(2)[rank].chunk(accumulate)))
        loss = lambda piece: (wrapped(piece[0]) - piece[1]).square().mean() / accumulate
        with opt.ascent():
            for piece in pieces:
                opt.ascend(loss(piece))
        with opt.perturbed():
            for piece in pieces:
                loss(piece).backward()
        opt.step()
        opt.zero_grad()
    torch.save([p.detach() for p in model.parameters()], sys.argv[5] + f"/{rank}.pt")
    dist.destroy_process_group()
    """
)


def train_two_ranks(folder, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *map(str, arguments), str(folder)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def train_one_process():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 2)).double()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[2].weight
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        (g,) = torch.autograd.grad((model(x) - y).square().mean(), weight)
        g, old = g[:, [1, 4, 7]], weight.detach().clone()
        with torch.no_grad():
            weight[:, [1, 4, 7]] += 0.4 * g / g.norm()
        (model(x) - y).square().mean().backward()
        with torch.no_grad():
            weight.copy_(old)
        base.step()
        base.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("ascent", ["selective", "grad"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ddp_ranks_equal_one_process(tmp_path, ascent, accumulate):
    first, second = train_two_ranks(tmp_path, ascent, 1, accumulate)
    for a, b, expected in zip(first, second, train_one_process(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=1e-12, atol=1e-13)


def test_without_sync_each_rank_perturbs_along_its_own_direction_and_weights_stay_alike(tmp_path):
    first, second = train_two_ranks(tmp_path, "selective", 0, 1)
    expected = train_one_process()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.allclose(a, e, rtol=1e-6) for a, e in zip(first, expected, strict=True))
