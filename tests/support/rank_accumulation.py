"""What each rank of the tests of accumulation does: updates of micro-batches, a perturbation for each or for all."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shapo_kernels as sk
from tests.support.ranks import on_rank

RHO, LR, RANKS, MICRO_BATCHES = 0.4, 0.1, 2, 3
INDICES = {"2.weight": [0, 5], "4.weight": [1, 4]}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def updates():
    """Two of them, each [ranks, micro-batches, rows, features]."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, RANKS, MICRO_BATCHES, 4, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(2, RANKS, MICRO_BATCHES, 4, 3, generator=generator, dtype=torch.float64)
    return zip(x, y, strict=True)


def mse(model, x, y):
    return (model(x) - y).square().mean()


def wrap(model, engine):
    if engine != "fsdp":
        return DistributedDataParallel(model, gradient_as_bucket_view=engine == "ddp with views")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=mesh)
    return model


def closure(model, opt, pieces):
    def run():
        opt.zero_grad()
        loss = sum(mse(model, *piece) for piece in pieces) / len(pieces)
        loss.backward()
        return loss

    return run


def train(case):
    engine, each, late, options = case
    model = wrap(build(), engine)
    base = torch.optim.SGD(model.parameters(), lr=LR)
    opt = sk.ShaPOOptimizer(base, model, sk.Subspace(INDICES), rho=RHO, **options)

    def unreduced(last):
        return contextlib.nullcontext() if last or not late else model.no_sync()

    for x, y in updates():
        pieces = list(zip(x[dist.get_rank()], y[dist.get_rank()], strict=True))
        if engine == "ddp by closure":
            opt.step(closure(model, opt, pieces))
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


if __name__ == "__main__":
    on_rank(train)
