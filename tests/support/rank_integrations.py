"""What each rank of the tests of Trainer and Accelerate does: training under the engine that Accelerate makes.

The same functions train in one process, which is what the ranks are compared with. Accelerate takes FSDP for devices
that are none of the CPU only; told that the device is one, all of its own code runs over gloo as it does over NCCL.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from engines import plain_name
from ranks import on_rank
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments, ShaPOState, ShaPOTrainerMixin

LOGGED = ("loss", "grad_norm", "shapo/ascent_loss", "shapo/gap", "shapo/grad_norm")


class ShaPOTrainer(ShaPOTrainerMixin, Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


@contextmanager
def accelerate_anew():
    """Accelerate and TrainingArguments keep what they were given in one state a process, and in the environment."""
    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)


def pretend_a_device():
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


def whole(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {plain_name(name): p.detach().clone() for name, p in model.named_parameters()}
    named = {plain_name(name): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in named.items()}


def trainer(case, folder, world):
    """A Trainer's updates; a second one that resumes from the first one's second checkpoint, where there is one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(getattr(torch, case.get("dtype", "float64")))
    tokens = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(0))
    engine = case.get("engine", "ddp")
    version = {"fsdp2": 2, "fsdp1": 1}.get(engine)
    if world > 1 and version is not None:
        settings = {"version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        engine_options = {"fsdp": True, "fsdp_config": {**settings, **case.get("fsdp_config", {})}}
    else:
        engine_options = {}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // world,
        max_steps=4,
        max_grad_norm=0.2,  # of norms near 0.7
        optim=case.get("optim", "adamw_torch"),
        learning_rate=1.0 if case.get("optim") == "sgd" else 0.01,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="steps" if case.get("resume") else "no",
        save_steps=1,
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
        **engine_options,
    )
    if engine_options:
        assert arguments.device.type == "cpu"
        pretend_a_device()
    subspace = sk.Subspace({f"model.layers.{i}.mlp.down_proj.weight": [1, 9, 40] for i in range(2)})
    made = ShaPOTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row.clone()} for row in tokens],
        shapo=ShaPOArguments(subspace, rho=0.5, **case.get("options", {})),
    )
    made.train(resume_from_checkpoint=case.get("from"))
    logs = [[entry[key] for key in LOGGED] for entry in made.state.log_history if "shapo/gap" in entry]
    optimizer = made._shapo_optimizer()
    assert made.is_fsdp_enabled == bool(engine_options)
    return {"parameters": whole(made.model), "logs": logs, "updates": optimizer.updates}


def loop(case, folder, world):
    """A plain Accelerate loop: the optimizer is made first and prepared with the model."""
    options = {}
    if world > 1 and case["engine"] == "fsdp2":
        PartialState(cpu=True)
        pretend_a_device()
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1
        )
    accelerator = Accelerator(cpu=not options, gradient_accumulation_steps=2, **options)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    base = torch.optim.AdamW(plain.parameters(), lr=0.1)
    shapo = sk.ShaPOOptimizer(base, plain, sk.Subspace({"2.weight": [3, 9]}), rho=0.3, **case.get("options", {}))
    model, opt = accelerator.prepare(plain, shapo)
    if world > 1:
        assert "FSDP" in type(model).__name__ or case["engine"] == "ddp"
    accelerator.register_for_checkpointing(ShaPOState(shapo))
    data = torch.randn(3, 2, 8, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if case.get("from"):
        accelerator.load_state(case["from"])
        assert shapo.updates == 1

    def loss(batch):
        return (model(batch[:, :8]) - batch[:, 8:]).square().mean()

    for update in data[shapo.updates :]:
        with torch.no_grad():  # an evaluation, after which fully_shard may leave gathered weights in their places
            loss(update[0])
        micro_batches = [micro.chunk(world)[accelerator.process_index] for micro in update]
        for number, micro in enumerate(micro_batches):
            with accelerator.accumulate(model):
                if case["each"]:
                    with shapo.ascent():
                        shapo.ascend(loss(micro))
                    with shapo.perturbed():
                        accelerator.backward(loss(micro))
                else:
                    if number == 0:
                        with shapo.ascent():
                            for one in micro_batches:
                                shapo.ascend(loss(one) / 2)
                        shapo.perturb()
                    accelerator.backward(loss(micro))
                    if accelerator.sync_gradients:
                        shapo.restore()
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
        if case.get("resume") and shapo.updates == 1:
            accelerator.save_state(str(folder / "saved"))
    return {"parameters": whole(model), "updates": shapo.updates}


def train(case):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(case["folder"])
    run = {"trainer": trainer, "loop": loop}[case["kind"]]
    with accelerate_anew():
        results = [run(case, folder, world)]
    if case.get("resume"):
        checkpoint = folder / ("checkpoint-1" if case["kind"] == "trainer" else "saved")
        with accelerate_anew():
            results.append(run({**case, "from": str(checkpoint), "resume": False}, folder, world))
    return results


if __name__ == "__main__":
    on_rank(train)
