"""Accumulation on several ranks: one perturbation an update, or one a micro-batch (m-sharpness), synchronised or not,
with gradients reduced in every backward pass or in the last alone (S12, S13).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

RHO, LR, RANKS, MICRO_BATCHES = 0.4, 0.1, 2, 3

COMMON = textwrap.dedent(
    """
    import torch
    from torch import nn

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    INDICES = {"2.weight": [0, 5], "4.weight": [1, 4]}

    def updates():
        # [updates, ranks, micro-batches, rows, features]
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(2, 2, 3, 4, 6, generator=generator, dtype=torch.float64)
        return zip(x, torch.randn(2, 2, 3, 4, 3, generator=generator, dtype=torch.float64))

    def mse(model, x, y):
        return (model(x) - y).square().mean()
    """
)
WORKER = COMMON + textwrap.dedent(
    """
    import contextlib
    import sys
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    import shapo_kernels as sk

    rank, cases, folder = int(sys.argv[1]), eval(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def train(engine, each, late, options):
        model = build()
        if engine != "fsdp":
            model = DistributedDataParallel(model, gradient_as_bucket_view=engine == "ddp with views")
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in (model[0], model[2], model[4], model):
                fully_shard(layer, mesh=mesh)
        opt = sk.ShaPOOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, sk.Subspace(INDICES), rho=0.4, **options
        )

        def unreduced(last):
            return contextlib.nullcontext() if last or not late else model.no_sync()

        for x, y in updates():
            pieces = list(zip(x[rank], y[rank]))

            def closure():
                opt.zero_grad()
                loss = sum(mse(model, *piece) for piece in pieces) / len(pieces)
                loss.backward()
                return loss

            if engine == "ddp by closure":
                opt.step(closure)
                continue
            groups = [[piece] for piece in pieces] if each else [pieces]
            for number, group in enumerate(groups):
                with unreduced(number == len(groups) - 1), opt.ascent():
                    for piece in group:
                        opt.ascend(mse(model, *piece) / len(group))
                with opt.perturbed():
                    for i, piece in enumerate(group):
                        with unreduced(number == len(groups) - 1 and i == len(group) - 1):
                            (mse(model, *piece) / len(pieces)).backward()
            opt.step()
            opt.zero_grad()
        opt.detach()
        return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]

    torch.save([train(*case) for case in cases], f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    """
)

# engine, a perturbation for each micro-batch, gradients reduced in the last backward pass alone, options
CASES: list[tuple[str, bool, bool, dict[str, Any]]] = [
    ("ddp", each, late, {"ascent": ascent, "sync": sync})
    for each in (False, True)
    for late in (False, True)
    for ascent in ("selective", "grad")
    for sync in (True, False)
]
CASES += [
    ("ddp with views", each, True, {"ascent": ascent}) for each in (False, True) for ascent in ("selective", "grad")
]
CASES += [("ddp", True, True, {"perturbation": "delta"}), ("fsdp", True, False, {}), ("fsdp", False, False, {})]
CASES += [
    ("ddp by closure", False, False, {"ascent": a, "sync": s}) for a in ("selective", "grad") for s in (True, False)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The parameters of every case after training, from both ranks: two processes for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), repr(CASES), str(folder)], env=environment)
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0] * RANKS
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def written_out(groups_of):
    """The same updates without the library: each group of pieces is perturbed along its own gradient."""
    names: dict[str, Any] = {}
    exec(COMMON, names)
    model, mse = names["build"](), names["mse"]
    weights = {"2.weight": model[2].weight, "4.weight": model[4].weight}
    masks = {}
    for name, weight in weights.items():
        masks[name] = torch.zeros_like(weight)
        masks[name][:, names["INDICES"][name]] = 1
    for x, y in names["updates"]():
        total = [torch.zeros_like(p) for p in model.parameters()]
        groups = groups_of(x, y)
        for group in groups:
            loss = sum(mse(model, *piece) for piece in group) / len(group)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            eps = [g * masks[name] for name, g in zip(weights, gradients, strict=True)]
            norm = torch.cat([e.flatten() for e in eps]).norm()
            with torch.no_grad():
                for weight, e in zip(weights.values(), eps, strict=True):
                    weight.add_(RHO * e / norm)
            loss = sum(mse(model, *piece) for piece in group) / len(group)
            for t, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                t.add_(g / len(groups))
            with torch.no_grad():
                for weight, e in zip(weights.values(), eps, strict=True):
                    weight.sub_(RHO * e / norm)
        with torch.no_grad():
            for p, t in zip(model.parameters(), total, strict=True):
                p.sub_(LR * t)
    return [p.detach() for p in model.parameters()]


def groups(each, sync):
    """Which (rank, micro-batch) pieces share a perturbation."""
    ranks, micro_batches = range(RANKS), range(MICRO_BATCHES)
    if each:
        return (
            [[(r, k) for r in ranks] for k in micro_batches]
            if sync
            else [[(r, k)] for r in ranks for k in micro_batches]
        )
    return (
        [[(r, k) for k in micro_batches for r in ranks]] if sync else [[(r, k) for k in micro_batches] for r in ranks]
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_ranks_with_micro_batches_equal_the_update_written_out(trained, number):
    _, each, _, options = CASES[number]
    sharing = groups(each, options.get("sync", True))
    expected = written_out(lambda x, y: [[(x[piece], y[piece]) for piece in group] for group in sharing])
    for rank in trained:
        for mine, other in zip(rank[number], expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_the_ways_to_share_a_perturbation_differ():
    ends = [
        torch.cat([p.flatten() for p in written_out(lambda x, y, s=s: [[(x[i], y[i]) for i in g] for g in s])])
        for s in (groups(each, sync) for each in (False, True) for sync in (False, True))
    ]
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(ends) for b in ends[:i])
