"""What each rank of :func:`ranks.run_ranks` does: three ShaPO updates of one model under one engine."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import shapo_kernels as sk
from tests.support.engines import AXES, INDICES, LR, RHO, batches, build, groups, mse, plain_name
from tests.support.ranks import on_rank
from tests.support.updates import closure_for


def wrap(model, engine, policy=None):
    """The model under an engine, how many ways the data is split, and this rank's place among them.

    Args:
        policy: fully_shard's mixed precision, with dtypes by name.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    layers = (model.up, model.down, model.conv, model.head)
    if engine in ("ddp", "ddp_static"):
        return DistributedDataParallel(model, static_graph=engine == "ddp_static"), world, rank
    if engine in ("fsdp", "fsdp_ignoring"):
        ignored = {model.head.weight} if engine == "fsdp_ignoring" else None
        dtypes = {
            key: getattr(torch, value) if isinstance(value, str) else value for key, value in (policy or {}).items()
        }
        for layer in (*layers, model):
            fully_shard(
                layer,
                mesh=init_device_mesh("cpu", (world,)),
                ignored_params=ignored,
                mp_policy=MixedPrecisionPolicy(**dtypes),
            )
        return model, world, rank
    if engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        for layer in (*layers, model):
            fully_shard(layer, mesh=mesh)
        return model, world, rank
    if engine.startswith("fsdp1"):
        strategy = {"fsdp1": "FULL_SHARD", "fsdp1_zero2": "SHARD_GRAD_OP", "fsdp1_hybrid": "HYBRID_SHARD"}[engine]
        hybrid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        policy = ModuleWrapPolicy({type(model.up), type(model.conv)})
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=policy,
            use_orig_params=True,
            sharding_strategy=ShardingStrategy[strategy],
            device_mesh=hybrid if engine == "fsdp1_hybrid" else None,
            device_id=torch.device("cpu"),
        )
        return model, world, rank
    ways = world // 2 if engine.startswith("fsdp_tp") else 1
    mesh = init_device_mesh("cpu", (ways, world // ways), mesh_dim_names=("dp", "tp"))
    # Parts of different sizes pass between the layers as DTensors only.
    plan = {"up": ColwiseParallel(use_local_output=model.up.out_features % 2 == 0), "down": RowwiseParallel()}
    if engine.endswith("sequence"):
        # Between the two projections and the next layer the rows lie over the ranks, as in sequence parallelism.
        plan["down"] = RowwiseParallel(output_layouts=Shard(0), use_local_output=False)
        plan["conv"] = PrepareModuleInput(
            input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True
        )
    parallelize_module(model, mesh["tp"], plan)
    if engine.startswith("fsdp_tp"):
        for layer in (*layers, model):
            fully_shard(layer, mesh=mesh["dp"])
    return model, ways, mesh.get_coordinate()[0]


def clip(parameters, most):
    """torch's clip_grad_norm_ takes parameters of one mesh; these are its two halves for each of several."""
    by_mesh = {}
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in together]) for together in by_mesh.values()]
    norm = torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).norm()
    for together in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(together, most, norm)


def update(model, opt, case, data):
    pieces = case.get("accumulate", 1)
    if case.get("closure"):
        opt.step(closure_for(opt, model, data, mse))
        return
    mine = [part.chunk(pieces) for part in data]
    with opt.ascent():
        for piece in zip(*mine, strict=True):
            opt.ascend(mse(model, piece) / pieces)
    with opt.perturbed():
        for piece in zip(*mine, strict=True):
            (mse(model, piece) / pieces).backward()
    if case["engine"] == "fsdp_ignoring":
        dist.all_reduce(model.head.weight.grad, op=dist.ReduceOp.SUM)
        model.head.weight.grad /= dist.get_world_size()
    if "clip" in case:
        clip(list(model.parameters()), case["clip"])
    opt.step()
    opt.zero_grad()


def whole(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            found = {name: p.detach().clone() for name, p in model.named_parameters()}
    else:
        found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {plain_name(name): p.detach() for name, p in found.items()}


def state(model, opt):
    weights, optimizer = get_state_dict(model, opt)
    return {"model": weights, "optimizer": optimizer, "shapo": opt.shapo_state_dict()}


def load(model, opt, checkpoint):
    found = state(model, opt)
    dcp.load(found, checkpoint_id=checkpoint)
    set_state_dict(model, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    opt.load_shapo_state_dict(found["shapo"])


def optimizer(model, case):
    base = torch.optim.SGD(groups(model, case.get("rhos")), lr=LR, momentum=case.get("momentum", 0.0))
    return sk.ShaPOOptimizer(base, model, sk.Subspace(INDICES, AXES), rho=RHO, **case.get("options", {}))


def train(case, resumed=False):
    """Three updates. Where there is a `checkpoint` it is saved after the first, and a second run goes on from it."""
    if case["engine"] == "ddp_of_an_early_model":
        plain, opt = EARLY
        model, ways, place = wrap(plain, "ddp")
    else:
        plain = build(case.get("width", 8)).to(getattr(torch, case.get("dtype", "float64")))
        model, ways, place = wrap(plain, case["engine"], case.get("policy"))
        opt = optimizer(model, case)
    if resumed:
        load(model, opt, case["checkpoint"])
    for x, y in list(batches())[opt.updates :]:
        x = x.to(getattr(torch, case.get("inputs", "float64")))
        update(model, opt, case, (x.chunk(ways)[place], y.chunk(ways)[place]))
        if "checkpoint" in case and opt.updates == 1:
            dcp.save(state(model, opt), checkpoint_id=case["checkpoint"])
    found = {"parameters": whole(model), "stats": opt.stats}
    if "checkpoint" in case and not resumed:
        found["resumed"] = train(case, resumed=True)["parameters"]
    return found


if __name__ == "__main__":
    # Made before the ranks have come together; the model is wrapped afterwards.
    early = build()
    EARLY = early, optimizer(early, {})
    on_rank(train)
