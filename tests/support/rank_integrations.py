"""What each rank of the tests of Trainer and Accelerate does: training under the engine that Accelerate makes.

The same functions train in one process, which is what the ranks are compared with. Accelerate takes FSDP for devices
that are none of the CPU only; told that the device is one, all of its own code runs over gloo as it does over NCCL.
"""

import importlib.util
import os
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments, ShaPOState, ShaPOTrainerMixin
from tests.support.accelerate_state import accelerate_anew
from tests.support.engines import plain_name
from tests.support.llamas import llama
from tests.support.ranks import on_rank

if importlib.util.find_spec("deepspeed"):
    import deepspeed

LOGGED = ("loss", "grad_norm", "shapo/ascent_loss", "shapo/gap", "shapo/grad_norm")


class InOrder:
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class ShaPOTrainer(ShaPOTrainerMixin, InOrder, Trainer):
    pass


class ShaPODPOTrainer(ShaPOTrainerMixin, InOrder, DPOTrainer):
    pass


def pretend_a_device():
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


def deepspeed_config(engine):
    # Its shared-memory collectives are compiled when they are first needed; gloo's do as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {
        "zero_optimization": {"stage": int(engine.removeprefix("zero")), "stage3_param_persistence_threshold": 100},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def whole(model):
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {plain_name(name): p.detach().clone() for name, p in model.named_parameters()}
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {plain_name(name): p.detach().clone() for name, p in model.named_parameters()}
    named = {plain_name(name): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in named.items()}


def model_of(case):
    return llama(intermediate_size=48, pad_token_id=0).to(getattr(torch, case.get("dtype", "float64")))


def trainers_arguments(kind, case, folder, world):
    version = {"fsdp2": 2, "fsdp1": 1}.get(case.get("engine", "ddp"))
    if world > 1 and version is not None:
        settings = {"version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        engine_options = {"fsdp": True, "fsdp_config": {**settings, **case.get("fsdp_config", {})}}
    elif world > 1 and case["engine"].startswith("zero"):
        engine_options = {"deepspeed": deepspeed_config(case["engine"])}
    else:
        engine_options = {}
    arguments = kind(
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
        save_steps=3,
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
        **engine_options,
        **case.get("arguments", {}),
    )
    if "fsdp" in engine_options:
        assert arguments.device.type == "cpu"
        pretend_a_device()
    return arguments


def trained(made, case):
    """Until its end, from a checkpoint on where the case has one."""
    made.train(resume_from_checkpoint=case.get("from"))
    assert made.is_fsdp_enabled == bool(made.args.fsdp)
    logs = [[entry[key] for key in LOGGED] for entry in made.state.log_history if "shapo/gap" in entry]
    assert made.is_deepspeed_enabled == bool(made.args.deepspeed)
    return {"parameters": whole(made.model), "logs": logs, "updates": made._shapo_optimizer().updates}


def shapo_arguments(case):
    subspace = sk.Subspace({f"model.layers.{i}.mlp.down_proj.weight": [1, 9, 40] for i in range(2)})
    return ShaPOArguments(subspace, rho=0.5, **case.get("options", {}))


def trainer(case, folder, world):
    """A Trainer's updates."""
    tokens = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(0))
    made = ShaPOTrainer(
        model_of(case),
        trainers_arguments(TrainingArguments, case, folder, world),
        train_dataset=[{"input_ids": row, "labels": row.clone()} for row in tokens],
        shapo=shapo_arguments(case),
    )
    return trained(made, case)


def dpo(case, folder, world):
    """trl's DPOTrainer on pairs of different lengths; its reference is a model of its own, or the adapter's base."""
    words = Tokenizer(WordLevel({str(number): number for number in range(64)}, unk_token="1"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2", unk_token="1")
    tokens = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"prompt": text(row[:3]), "chosen": text(row[3 : 6 + n % 3]), "rejected": text(row[8 : 10 + n % 2])}
        for n, row in enumerate(tokens)
    ]
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = ShaPODPOTrainer(
        model_of(case),
        None if case.get("adapter") else model_of(case),
        trainers_arguments(DPOConfig, {"arguments": {"bf16": False}, **case}, folder, world),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter if case.get("adapter") else None,
        shapo=shapo_arguments(case),
        fused_head=case.get("fused_head", "off"),
    )
    return trained(made, case)


def text(tokens):
    return " " + " ".join(map(str, tokens))


def prepared(accelerator, plain, made, case):
    """The prepared model, what steps, and the ShaPOOptimizer that it is or has inside."""
    options = {"rho": 0.3, **case.get("options", {})}
    subspace = sk.Subspace({"2.weight": [3, 9]})
    engine = case["engine"] if accelerator.num_processes > 1 else "none"
    if engine.startswith("zero"):
        model, base = accelerator.prepare(plain, made(plain.parameters(), lr=0.1))
        shapo = sk.ShaPOOptimizer(base, model, subspace, **options)
        return model, shapo, shapo
    if engine == "fsdp1":
        model = accelerator.prepare(plain)
        shapo = sk.ShaPOOptimizer(made(model.parameters(), lr=0.1), model, subspace, **options)
        return model, accelerator.prepare(shapo), shapo
    shapo = sk.ShaPOOptimizer(made(plain.parameters(), lr=0.1), plain, subspace, **options)
    return *accelerator.prepare(plain, shapo), shapo


def loop(case, folder, world):
    """A plain Accelerate loop: the optimizer is prepared with the model; under FSDP1 and DeepSpeed made around it."""
    options = {}
    zero = world > 1 and case["engine"].startswith("zero")
    if world > 1 and case["engine"].startswith("fsdp"):
        PartialState(cpu=True)
        pretend_a_device()
        # FSDP1's whole state dicts move to the CPU, from where they are not copied then, and are freed.
        of_fsdp1 = {"use_orig_params": True, "sync_module_states": False, "state_dict_type": "SHARDED_STATE_DICT"}
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=int(case["engine"][-1]),
            auto_wrap_policy="size_based_wrap",
            min_num_params=1,
            **(of_fsdp1 if case["engine"] == "fsdp1" else {}),
        )
    if zero:
        config = {**deepspeed_config(case["engine"]), "gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 4}
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(cpu=not options, gradient_accumulation_steps=2, **options)
    dtype = getattr(torch, case.get("dtype", "float64"))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    made = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[case.get("optim", "adamw")]
    model, opt, shapo = prepared(accelerator, plain, made, case)
    if world > 1:
        engine = {"ddp": "Distributed", "fsdp1": "FullySharded", "fsdp2": "FSDP", "zero": "DeepSpeed"}
        assert type(model).__name__.startswith(engine[case["engine"] if not zero else "zero"])
    accelerator.register_for_checkpointing(ShaPOState(shapo))
    data = torch.randn(3, 2, 8, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
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
    run = {"trainer": trainer, "dpo": dpo, "loop": loop}[case["kind"]]
    with accelerate_anew():
        results = [run(case, folder, world)]
    if case.get("resume"):
        checkpoint = folder / ("saved" if case["kind"] == "loop" else "checkpoint-3")
        with accelerate_anew():
            results.append(run({**case, "from": str(checkpoint), "resume": False}, folder, world))
    return results


if __name__ == "__main__":
    on_rank(train)
