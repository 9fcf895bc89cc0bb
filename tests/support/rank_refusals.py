"""What each rank of the tests of refusals does: make an optimizer and its first update, and return the complaint."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shapo_kernels as sk
from tests.support.engines import AXES, INDICES, batches, build, mse
from tests.support.ranks import on_rank


def made(engine):
    model, mesh = build(), init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if engine == "fully_shard":
        fully_shard(model)
    elif engine.startswith("fsdp1"):
        model = FullyShardedDataParallel(
            model,
            use_orig_params=engine != "fsdp1_flat",
            sharding_strategy=ShardingStrategy["NO_SHARD" if engine == "fsdp1_no_shard" else "FULL_SHARD"],
            auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear}) if engine == "fsdp1_inner" else None,
            device_id=torch.device("cpu"),
        )
    elif engine == "ddp_static":
        model = DistributedDataParallel(model, static_graph=True)
    elif engine == "partial":
        parameter = DTensor.from_local(model.down.weight.detach(), mesh, [Partial()])
        model.down.weight = torch.nn.Parameter(parameter)
    elif engine == "half_of_the_ranks":
        half = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))["tp"]
        parallelize_module(model, half, plan)
    elif engine == "ddp_of_tensor_parallel":
        both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
        model = DistributedDataParallel(parallelize_module(model, both["tp"], plan), device_mesh=both["dp"])
    elif engine == "forward_replaced":
        # As transformers' tensor parallelism: DTensors inside of `forward` only.
        parallelize_module(model, mesh, {"down": RowwiseParallel()})
        inner = model.down
        inner._forward_pre_hooks.clear()
        inner._forward_hooks.clear()
        forward = inner.forward

        def local(x):
            part = x.chunk(dist.get_world_size(), -1)[dist.get_rank()]
            sharded = DTensor.from_local(part, mesh, inner.weight.placements)
            return forward(sharded).redistribute(placements=[Replicate()]).to_local()

        inner.forward = local
    return model


def complaint(case):
    model = made(case["engine"])
    try:
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        names = case.get("names", ["down.weight"])
        subspace = sk.Subspace({n: INDICES[n] for n in names}, {n: AXES[n] for n in names})
        known = model.module if case["engine"] == "fsdp1_inner" else model
        opt = sk.ShaPOOptimizer(base, known, subspace, rho=0.1, **case.get("options", {}))
        if case.get("by_hand"):
            opt.perturb()
        if case.get("closure"):
            opt.step(lambda: mse(model, next(batches(1))).backward())
        for data in batches(1):
            with opt.ascent():
                opt.ascend(mse(model, data))
            with opt.perturbed():
                mse(model, data).backward()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    on_rank(complaint)
