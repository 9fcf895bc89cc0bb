"""What each rank of :func:`ranks.run_ranks` does: updates that reuse the blocks below, and the same that do not."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import shapo_kernels as sk
from tests.support.ranks import on_rank

SUBSPACE = {"blocks.2.down.weight": [1, 6], "blocks.3.down.weight": [0]}


class Collectives(TorchDispatchMode):
    """Counts them, without the global hooks of torch's CommDebugMode."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.inlet(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def wrap(model, engine, **options):
    world = dist.get_world_size()
    if engine == "ddp":
        return DistributedDataParallel(model, **options)
    if engine == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if options.pop("checkpoint", False):
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    if engine == "tp":
        for block in model.modules():
            if isinstance(block, Block):
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, init_device_mesh("cpu", (world,)), plan)
        return model
    if policy := options.pop("policy", None):
        options["mp_policy"] = MixedPrecisionPolicy(**{k: getattr(torch, v) for k, v in policy.items()})
    for layer in (*model.blocks, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (world,)), **options)
    return model


def loss(model, data):
    return (model(data[0]) - data[1]).square().mean()


def batches(case):
    generator = torch.Generator().manual_seed(7)
    ways, place = (1, 0) if case["engine"] == "tp" else (dist.get_world_size(), dist.get_rank())
    for _ in range(3):
        x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 3))
        if case.get("wrap", {}).get("policy"):
            x, y = x.float(), y.float()
        yield list(zip(x.chunk(ways)[place].chunk(2), y.chunk(ways)[place].chunk(2), strict=True))


def update(model, opt, case, pieces):
    if case.get("closure"):

        def closure():
            opt.zero_grad()
            value = loss(model, [torch.cat(part) for part in zip(*pieces, strict=True)])
            value.backward()
            return value

        opt.step(closure)
        return
    rows = torch.tensor([1]) if case.get("part") else None
    with opt.ascent():
        for piece in pieces:
            if rows is None:
                opt.ascend(loss(model, piece) / 2)
                continue
            with opt.ascent_part(partial(model, piece[0]), rows):
                opt.ascend(loss(model, [both[rows] for both in piece]) / 2)
    with opt.perturbed():
        for piece in pieces:
            (loss(model, piece) / 2).backward()
    opt.step()
    opt.zero_grad()


def train(case, reuse):
    torch.manual_seed(0)
    plain = Net().double()
    if case.get("wrap", {}).get("policy"):
        plain = plain.float()
    model = wrap(plain, case["engine"], **case.get("wrap", {}))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    try:
        opt = sk.ShaPOOptimizer(
            base, model, sk.Subspace(SUBSPACE), rho=0.4, reuse_prefix=reuse, **case.get("options", {})
        )
    except ValueError as error:
        return str(error)
    with Collectives() as collectives:
        for pieces in batches(case):
            update(model, opt, case, pieces)
    found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {
        "parameters": {name: p.detach() for name, p in found.items()},
        "collectives": collectives.count,
        "blocks": opt.stats.get("prefix_blocks"),
    }


if __name__ == "__main__":
    on_rank(
        lambda case: {"reusing": train(case, True), "plain": train(case, False) if not case.get("refused") else None}
    )
