"""What each rank of the tests of the loops does: `shapo`'s own training under the engine that Accelerate makes.

The engines are those of the shipped configuration files, read by Accelerate's launcher. The same functions train in one
process, which is what the ranks are compared with.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch

from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data import synthetic
from shapo.data.formats import load_pairs
from shapo.data.noise import flip_labels
from shapo.data.tokens import PairEncoder
from shapo.libraries.accelerate import join, make_accelerator
from shapo.models.adapters import Lora, adapters_subspace, add_lora
from shapo.models.spread import read_once, skeleton
from shapo.ranks import Ranks
from shapo.recipe import PRESETS
from shapo.scoring.logps import TokenizedPairs
from shapo.scoring.rewards import PairRewards
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences
from shapo.training.sft import train_sft
from shapo.training.sharding import partition_by_zero3, shard_by_fsdp2
from shapo_kernels import Subspace
from tests.support.accelerate_state import accelerate_anew
from tests.support.heap import peak_bytes
from tests.support.llamas import llama
from tests.support.ranks import on_rank

LATE_IMPORTS = (
    "peft",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.module_inject",
)
PAIRS = 11
# Of 11 pairs in batches of 4 the last has 3, and of two ranks' micro-batches one has a pair on one of them only.
LOOP = {"updates": 4, "batch_size": 4, "accumulate": 2, "lr": 0.5, "warmup": 0, "optimizer": "sgd", "clip": 0.2}
SUBSPACE = {f"model.layers.{layer}.mlp.down_proj.weight": [0, 5, 9, 40] for layer in range(2)}


def environment_of(engine):
    """What `accelerate launch --config_file FILE` puts into the ranks' environment; nothing for torchrun alone."""
    if engine == "ddp":
        return {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = PRESETS / "accelerate" / f"{engine}.yaml"
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "--main_process_port", "0", "train.py"])
    )
    arguments.deepspeed_fields_from_accelerate_config = "zero_stage"
    made = prepare_deepspeed_cmd_env(arguments)[1] if engine.startswith("zero") else prepare_multi_gpu_env(arguments)
    return {name: text for name, text in made.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def prepared(case):
    rows = synthetic.generate(0, sft=40, train=16, selection=2, test=4, test_unseen=2)
    tokenizer = synthetic.train_tokenizer((a + b for a, b in synthetic.sft_examples(rows["sft"], seed=0)), 300)
    encoder = PairEncoder(tokenizer, max_length=64, max_prompt_length=40)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1}
    size |= {"tie_word_embeddings": case.get("tied", False), "attention_dropout": case.get("dropout", 0.0)}
    model = llama(**size, pad_token_id=tokenizer.pad_token_id)
    # ZeRO steps float32 copies of whatever it is given.
    model = model.to(getattr(torch, case.get("dtype", "float64")))
    return model, encoder, rows


def train(case, folder, *, resume=False):
    """The weights that rank 0 saves, and the lines of metrics.jsonl."""
    model, encoder, rows = prepared(case)
    saved = {}

    def save(whole):
        saved.update({name: value.detach().clone() for name, value in whole.state_dict().items()})

    loop = LoopConfig(**{**LOOP, **case.get("loop", {})})
    options = {"output": Path(folder), "save": save, "resume": resume, "progress": False}
    if case.get("kind") == "sft":
        model = skeleton(model) if Ranks.here().rank else model
        examples = [(pair.prompt, pair.chosen) for pair in load_pairs(rows["train"][:PAIRS])]
        train_sft(model, encoder, examples, config=loop, held_out=examples[:3], **options)
        return saved, lines(folder)
    pairs = flip_labels(load_pairs(rows["train"][:PAIRS]), 0.3, seed=1)
    loss = LossConfig(**case.get("loss", {}))
    if case.get("lora"):
        model = add_lora(model, Lora(r=2), seed=0)
    if Ranks.here().rank:
        model = skeleton(model)  # rank 0 alone reads it
    subspace = None
    if "shapo" in case:
        subspace = adapters_subspace(model) if case.get("lora") else Subspace(case.get("subspace", SUBSPACE))
    generator = torch.Generator().manual_seed(2)
    rewards = PairRewards(*torch.randn(2, PAIRS, generator=generator)) if loss.uses_rewards else None
    train_preferences(
        model,
        TokenizedPairs(pairs, encoder),
        loss=loss,
        loop=loop,
        shapo=shapo_of(case["shapo"]) if "shapo" in case else None,
        subspace=subspace,
        rewards=rewards,
        evaluation=TokenizedPairs(load_pairs(rows["test"][:3]), encoder),
        **options,
    )
    return saved, lines(folder)


def shapo_of(options):
    rho = options["rho"]
    return ShaPOConfig(**{**options, "rho": tuple(rho) if isinstance(rho, (list, tuple)) else rho})


def lines(folder):
    """Of metrics.jsonl, without what is each rank's own: times, and the memory that its share takes."""

    def shared(values):
        own = ("seconds", "cpu_seconds", "prefix_bytes")
        return {k: shared(v) if isinstance(v, dict) else v for k, v in values.items() if k not in own}

    return [shared(row) for row in read_metrics(Path(folder) / "metrics.jsonl")]


def start(engine):
    """What this rank has in use at most while a model is read and sharded, the size of the model, and its buffer.

    In bytes; a rank that reads no model has none of its size.
    """
    sizes, made = [], []
    shard = {"fsdp2": shard_by_fsdp2, "zero3": partition_by_zero3}[engine]
    accelerator = make_accelerator(micro_batch_size=1, clip=0.0, bf16_weights=False)

    def read():
        model = llama(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=512)
        model.register_buffer("kept", torch.tensor(7.0))
        sizes.extend(weight.nbytes for weight in model.parameters())
        return model

    def run():
        model = read_once(Ranks.here(), read)
        made.append(shard(accelerator, model) or model)

    peak = peak_bytes(lambda: run)
    return peak, sum(sizes), made[0].kept.item()


def on_ranks(case):
    """What `train` returns; with `again` once more, of a run that goes on from the first one's last checkpoint.

    With `fails`, what it says in the place of training.
    """
    results = []
    for again in range(1 + case.get("again", False)):
        with accelerate_anew():
            os.environ.update(environment_of(case["engine"]))
            join(cpu=True, timeout=timedelta(seconds=100))
            if case.get("starts"):
                results.append(start(case["engine"]))
                continue
            try:
                results.append(train(case, case["folder"], resume=bool(again or case.get("resume"))))
            except Exception as error:
                if case.get("fails"):
                    return f"{type(error).__name__}: {error}"
                raise RuntimeError(str(case)) from error
    return results


if __name__ == "__main__":
    on_rank(on_ranks)
