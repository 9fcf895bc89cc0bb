"""Data-parallel ranks move along one direction: gloo processes under DDP, FSDP2 and HSDP equal one process (S12)."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

# Layers of 7 and 3 rows: shards are uneven and, on four ranks, one has no row of the last layer.
COMMON = textwrap.dedent(
    """
    import torch
    from torch import nn

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), Conv1D(6, 7), nn.Tanh(), nn.Linear(6, 3)).double()

    INDICES, AXES = {"2.weight": [0, 5], "4.weight": [1, 4]}, {"2.weight": 0, "4.weight": 1}

    def batches():
        generator = torch.Generator().manual_seed(7)
        for _ in range(3):
            x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            yield x, torch.randn(8, 3, generator=generator, dtype=torch.float64)
    """
)
WORKER = COMMON + textwrap.dedent(
    """
    import sys
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    import shapo_kernels as sk

    rank, world, engine, options, accumulate, folder = sys.argv[1:]
    rank, world, accumulate, options = int(rank), int(world), int(accumulate), eval(options)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = build()
    if engine == "ddp":
        model = DistributedDataParallel(model)
    else:
        shape = (world,) if engine == "fsdp" else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    base, subspace = torch.optim.SGD(model.parameters(), lr=0.1), sk.Subspace(INDICES, AXES)
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.4, **options)
    for x, y in batches():
        pieces = list(zip(x.chunk(world)[rank].chunk(accumulate), y.chunk(world)[rank].chunk(accumulate)))
        loss = lambda piece: (model(piece[0]) - piece[1]).square().mean() / accumulate
        with opt.ascent():
            for piece in pieces:
                opt.ascend(loss(piece))
        with opt.perturbed():
            for piece in pieces:
                loss(piece).backward()
        opt.step()
        opt.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    torch.save({"parameters": [p.detach() for p in whole], "stats": opt.stats}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    """
)


def train_ranks(folder, engine, world=2, accumulate=1, **options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [str(world), engine, repr(options), str(accumulate), str(folder)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments], env=environment)
        for rank in range(world)
    ]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def train_one_process():
    """The same update written out, without the library's optimizer."""
    names: dict = {}
    exec(COMMON, names)
    model = names["build"]()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = {"2.weight": model[2].weight, "4.weight": model[4].weight}
    for x, y in names["batches"]():
        gradients = torch.autograd.grad((model(x) - y).square().mean(), list(weights.values()))
        selected = [
            g.index_select(names["AXES"][name], torch.tensor(names["INDICES"][name]))
            for name, g in zip(weights, gradients, strict=True)
        ]
        norm = torch.cat([g.flatten() for g in selected]).norm()
        old = [w.detach().clone() for w in weights.values()]
        with torch.no_grad():
            for (name, w), g in zip(weights.items(), selected, strict=True):
                w.index_add_(names["AXES"][name], torch.tensor(names["INDICES"][name]), 0.4 * g / norm)
        (model(x) - y).square().mean().backward()
        with torch.no_grad():
            chosen = [
                w.index_select(names["AXES"][n], torch.tensor(names["INDICES"][n]))
                for n, w in zip(weights, old, strict=True)
            ]
            for w, o in zip(weights.values(), old, strict=True):
                w.copy_(o)
        weight_norm = torch.cat([c.flatten() for c in chosen]).norm().item()
        base.step()
        base.zero_grad()
    return [p.detach() for p in model.parameters()], {"grad_norm": norm.item(), "weight_norm": weight_norm}


CASES = [
    ("ddp", 2, {"ascent": "selective"}, 1),
    ("ddp", 2, {"ascent": "selective", "perturbation": "delta"}, 2),
    ("ddp", 2, {"ascent": "grad"}, 2),
    ("fsdp", 2, {}, 1),
    ("fsdp", 4, {}, 2),
    ("hsdp", 4, {"perturbation": "delta"}, 1),
]


@pytest.mark.parametrize(("engine", "world", "options", "accumulate"), CASES)
def test_ranks_equal_one_process(tmp_path, engine, world, options, accumulate):
    results = train_ranks(tmp_path, engine, world, accumulate, **options)
    parameters, stats = train_one_process()
    for result in results:
        for mine, first, expected in zip(result["parameters"], results[0]["parameters"], parameters, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)
        for key, expected in stats.items():
            assert result["stats"][key] == pytest.approx(expected, rel=1e-9)


def test_without_sync_each_rank_perturbs_along_its_own_direction_and_weights_stay_alike(tmp_path):
    first, second = (result["parameters"] for result in train_ranks(tmp_path, "ddp", sync=False))
    expected, _ = train_one_process()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.allclose(a, e, rtol=1e-6) for a, e in zip(first, expected, strict=True))


REFUSAL = COMMON + textwrap.dedent(
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
    import shapo_kernels as sk

    dist.init_process_group("gloo", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def attempt(model, **options):
        try:
            base, subspace = torch.optim.SGD(model.parameters(), lr=0.1), sk.Subspace({"4.weight": [1]})
            sk.ShaPOOptimizer(base, model, subspace, rho=0.1, **options)
        except ValueError as error:
            print(error)

    sharded = build()
    fully_shard(sharded, mesh=mesh)
    attempt(sharded, perturbation="in_place")
    attempt(sharded, ascent="grad")
    attempt(parallelize_module(build(), mesh, {"4": RowwiseParallel()}))
    dist.destroy_process_group()
    """
)


def test_what_sharded_weights_cannot_do_is_refused_in_one_line_each():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, "-c", REFUSAL], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert "use ascent='selective' with perturbation='delta'" in lines[0] == lines[1]
    assert "tensor-parallel weights are not supported" in lines[2]
