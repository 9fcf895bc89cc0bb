"""What each rank of :func:`ranks.run_ranks` does under DeepSpeed: ShaPO updates of one model, and what is refused."""

import contextlib
import warnings
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import shapo_kernels as sk
from tests.support.engines import AXES, INDICES, LR, RHO, batches, build, groups, mse, plain_name
from tests.support.ranks import on_rank

# DeepSpeed's shared-memory collectives are compiled when they are first needed; gloo's do as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
warnings.simplefilter("ignore", FutureWarning)


def engine_of(model, case, parameters=None):
    """The engine that a config makes; `case["zero"]` are options of its stage."""
    pieces = case.get("accumulate", 1)
    config = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size() // pieces,
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": case.get("clip", 0.0),
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.get("config", {}),
    }
    made = torch.optim.SGD if case.get("base", "SGD") == "SGD" else torch.optim.AdamW
    base = made(parameters or groups(model, case.get("rhos")), lr=LR)
    return deepspeed.initialize(model=model, optimizer=base, config=config)[0]


def model_for(case):
    # ZeRO-0 reduces no float64.
    model = build(case.get("width", 8)).to(torch.float64 if case["stage"] else torch.float32)
    if case.get("leaves"):
        deepspeed.utils.set_z3_leaf_modules(model, [nn.Linear])
    return model


def wrapped(engine, case):
    return sk.ShaPOOptimizer(engine.optimizer, engine, sk.Subspace(INDICES, AXES), rho=RHO, **case.get("options", {}))


def pieces_of(data, case):
    """This rank's part of a batch, in micro-batches."""
    mine = [t.chunk(dist.get_world_size())[dist.get_rank()].chunk(case.get("accumulate", 1)) for t in data]
    return list(zip(*mine, strict=True))


def update(engine, opt, pieces):
    """As a loop of one's own has it; micro-batches are counted by either's step."""
    if opt.due:
        with opt.ascent():
            for piece in pieces:
                opt.ascend(mse(engine, piece) / len(pieces))
    with opt.perturbed():
        for number, piece in enumerate(pieces, 1):
            engine.backward(mse(engine, piece))
            if number < len(pieces):
                (engine if number % 2 else opt).step()
    engine.step()


def whole(engine, stage):
    """The parameters, gathered."""
    parameters = dict(engine.module.named_parameters())
    gathered = deepspeed.zero.GatheredParameters(list(parameters.values())) if stage == 3 else contextlib.nullcontext()
    with gathered:
        return {plain_name(name): p.detach().clone() for name, p in parameters.items()}


def train(case):
    engine = engine_of(model_for(case), case)
    opt = wrapped(engine, case)
    dtype = next(engine.module.parameters()).dtype
    for data in batches():
        update(engine, opt, pieces_of([t.to(dtype) for t in data], case))
    return {"parameters": whole(engine, case["stage"]), "stats": opt.stats, "updates": opt.updates}


def resume(case):
    """Five updates at once, and the same with everything made anew after the third, in the middle of an interval."""
    folder = Path(case["folder"])

    def make():
        engine = engine_of(model_for(case), case)
        opt = wrapped(engine, case)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        return engine, opt, schedule

    def go(engine, opt, schedule, data):
        for batch in data:
            update(engine, opt, pieces_of(batch, case))
            schedule.step()

    data = list(batches(5))
    engine, opt, schedule = make()
    go(engine, opt, schedule, data[:3])
    engine.save_checkpoint(folder, client_state={"shapo": opt.shapo_state_dict(), "schedule": schedule.state_dict()})
    go(engine, opt, schedule, data[3:])
    again, opt_again, schedule_again = make()
    _, state = again.load_checkpoint(folder)
    opt_again.load_shapo_state_dict(state["shapo"])
    schedule_again.load_state_dict(state["schedule"])
    go(again, opt_again, schedule_again, data[3:])
    return {
        "straight": whole(engine, case["stage"]),
        "resumed": whole(again, case["stage"]),
        "updates": (opt.updates, opt_again.updates),
    }


def frozen(case):
    """Only the head is trained; the perturbed weights below it are frozen, as an adapter's base is."""
    model = model_for(case)
    for parameter in (p for name, p in model.named_parameters() if not name.startswith("head")):
        parameter.requires_grad_(False)
    engine = engine_of(model, case, list(model.head.parameters()))
    opt = wrapped(engine, case)
    for data in batches(1):
        update(engine, opt, pieces_of(data, case))
    return {"parameters": whole(engine, case["stage"]), "stats": opt.stats}


def messages(case):
    """What is said where the engine is used otherwise."""
    said = {}

    def noted(name, run, kind):
        try:
            run()
        except kind as error:
            said[name] = str(error)

    torch.manual_seed(0)
    data = next(iter(batches(1)))
    mine = pieces_of(data, case)[0]
    model = model_for(case)
    engine = engine_of(model, case)
    subspace = sk.Subspace(INDICES, AXES)

    def make(base, wrapped_model, **options):
        return lambda: sk.ShaPOOptimizer(base, wrapped_model, subspace, rho=RHO, **options)

    noted("module", make(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), model), ValueError)
    noted("inside", make(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), nn.Sequential(engine)), ValueError)
    noted("other base", make(engine.basic_optimizer, engine), TypeError)
    noted("engine's base", make(engine.optimizer, nn.Linear(2, 2)), TypeError)
    noted("grad", make(engine.optimizer, engine, ascent="grad"), ValueError)
    opt = wrapped(engine, {})
    noted("closure", lambda: opt.step(lambda: None), TypeError)
    noted("by hand", opt.perturb, RuntimeError)
    noted("state_dict", opt.state_dict, RuntimeError)
    noted("second", lambda: wrapped(engine, {}), RuntimeError)
    noted("backward in an ascent", opt.ascent()(lambda: engine.backward(mse(engine, mine))), RuntimeError)
    engine.backward(mse(engine, mine))
    noted("no ascent", engine.step, RuntimeError)
    opt.detach()
    engine.step()
    assert opt.updates == 0
    assert engine.was_step_applied()
    before = build()
    base = torch.optim.SGD(before.parameters(), lr=LR)
    early = sk.ShaPOOptimizer(base, before, subspace, rho=RHO)
    deepspeed.initialize(model=before, optimizer=base, config=engine.config)
    noted("wrapped before", lambda: early.ascent().__enter__(), ValueError)
    noted("no base", make(None, engine), TypeError)
    return said


if __name__ == "__main__":
    runs = {"train": train, "resume": resume, "frozen": frozen, "messages": messages}
    on_rank(lambda case: runs[case.get("run", "train")](case))
