"""A planned update against one that is run: peak memory, operations, and the price that was timed and recorded."""

import json
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from benchmarks.measure import peak_extra_bytes
from shapo.config import LoopConfig
from shapo.models.adapters import Lora, add_lora
from shapo.models.blocks import checkpoint_blocks
from shapo.models.fused_head import find_fused_head
from shapo.models.loading import load_model
from shapo.planning.tracing import ACTIVATIONS, GRADIENTS, HEAD, STATES, WEIGHTS
from shapo.planning.updates import Load, trace_update
from shapo.scoring.logps import batch_logps
from shapo.selection import random_subspace
from shapo_kernels import ShaPOOptimizer, Subspace, losses
from tests.support.llamas import llama

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SHAPE = {"vocab_size": 640, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4}
PAIRS, LENGTH, PROMPT, PERCENT, DEPTH = 4, 64, 32, 5.0, 0.5


def load(**changes):
    options = {"fused_head": "off", **changes.pop("loop", {})}
    settings = {"pairs": PAIRS, "micro_batches": 1, "length": LENGTH, "prompt": PROMPT, "dtype": "float32"}
    settings |= {"loop": LoopConfig(**options), "percent": PERCENT, "depth": DEPTH, "foreach": False, **changes}
    return Load(**settings)


def in_four_bits(model, dtype):
    """As `--qlora` loads it."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_model(folder, dtype=dtype, device="cpu", four_bit=True)


def scales_of(model):
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


class Real:
    """The same update of a model with weights."""

    def __init__(self, way, load, attn=None):
        self.model = llama(**SHAPE).to(getattr(torch, load.dtype)).eval()
        if way == "qlora":
            self.model = in_four_bits(self.model, load.dtype)
        if attn:
            self.model.set_attn_implementation(attn)
        if way in ("lora", "qlora"):
            self.model = add_lora(self.model, load.lora, seed=0)
        if load.gradient_checkpointing:
            checkpoint_blocks(self.model)
        ids = torch.randint(0, 100, (2 * load.pairs, load.length))
        labels = ids.masked_fill(torch.arange(load.length) < load.prompt, -100)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.load, self.head = load, find_fused_head(self.model, load.loop.fused_head)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = self.base = torch.optim.AdamW(trained, lr=1e-4, foreach=load.foreach)
        if way == "sam":
            self.opt = ShaPOOptimizer(
                self.base, self.model, Subspace.full(self.model), rho=0.05, ascent="grad", perturbation="in_place"
            )
        elif way in ("in_place", "delta", "reuse"):
            subspace = random_subspace(self.model, PERCENT, seed=0, depth=DEPTH if way == "reuse" else 1.0)
            held = "in_place" if way == "in_place" else "delta"
            self.opt = ShaPOOptimizer(
                self.base, self.model, subspace, rho=0.05, perturbation=held, reuse_prefix=way == "reuse"
            )

    def loss(self):
        policy = batch_logps(self.model, self.batch, bf16=self.load.loop.bf16, head=self.head)
        known = policy.chosen.detach()
        per_pair = losses.dpo(policy.chosen, policy.rejected, known, known, beta=0.1)
        return per_pair.mean() / self.load.micro_batches

    def passes(self):
        if self.opt is not self.base:
            with self.opt.ascent():
                for _ in range(self.load.micro_batches):
                    self.opt.ascend(self.loss())
            with self.opt.perturbed():
                self.backward()
        else:
            self.backward()

    def backward(self):
        for _ in range(self.load.micro_batches):
            self.loss().backward()

    def __call__(self):
        self.passes()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad()

    def held(self):
        states = [v for state in self.base.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *states, *scales_of(self.model)]
        return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


FOUR_BITS = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
CASES = [
    ("plain", {}),
    ("lora", {}),
    pytest.param("qlora", {}, marks=FOUR_BITS),
    pytest.param("qlora", {"dtype": "bfloat16", "gradient_checkpointing": True}, marks=FOUR_BITS),
    ("in_place", {}),
    ("delta", {}),
    ("reuse", {}),
    ("sam", {}),
    ("plain", {"loop": {"fused_head": "on"}}),
    ("delta", {"loop": {"fused_head": "on"}}),
    ("delta", {"gradient_checkpointing": True}),
    ("delta", {"pairs": 2, "micro_batches": 3}),
    ("plain", {"loop": {"bf16": True}}),
    ("delta", {"dtype": "bfloat16"}),
    ("plain", {"pairs": 1, "length": 8, "prompt": 4}),
    ("plain", {"pairs": 1, "length": 8, "prompt": 4, "foreach": True}),
]


@pytest.mark.parametrize(("way", "changes"), CASES, ids=str)
def test_peak_memory_is_within_15_percent_of_the_measured(way, changes):
    settings = load(**changes)
    planned = trace_update(LlamaConfig(**SHAPE), way, settings)
    update = Real(way, settings)
    update()  # the optimizer's states
    held, extra = update.held(), peak_extra_bytes(update)
    assert planned.peak == pytest.approx(held + extra, rel=0.15)
    assert planned.peak - held == pytest.approx(extra, rel=0.15)


def test_parts_are_those_of_the_tensors():
    planned = trace_update(LlamaConfig(**SHAPE), "plain", load())
    update = Real("plain", load())
    weights = sum(p.nbytes for p in update.model.parameters())
    buffers = sum(b.nbytes for b in update.model.buffers())
    assert planned.largest[WEIGHTS] == weights + buffers
    assert planned.largest[GRADIENTS] == weights
    assert planned.largest[STATES] == pytest.approx(2 * weights, rel=0.2)
    assert planned.largest[HEAD] == 2 * 4 * 2 * PAIRS * LENGTH * SHAPE["vocab_size"]  # logits and their gradient
    assert planned.largest[ACTIVATIONS] > 0


@FOUR_BITS
def test_a_base_in_4_bits_takes_the_bytes_that_bitsandbytes_gives_it():
    planned, real = trace_update(LlamaConfig(**SHAPE), "qlora", load()), Real("qlora", load()).model
    tensors = [*real.parameters(), *real.buffers(), *scales_of(real)]
    assert planned.largest[WEIGHTS] == sum(tensor.nbytes for tensor in tensors)


class Operations(TorchDispatchMode):
    """torch's formulas on real tensors; not `FlopCounterMode`, whose hooks on modules lead backward passes further."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("way", ["plain", "lora", "delta", "reuse", "sam"])
def test_operations_are_those_that_torch_counts(way):
    config = LlamaConfig(**SHAPE)
    planned = trace_update(config, way, load(attn="eager"))
    update = Real(way, load(), attn="eager")
    with Operations() as counter:
        update.passes()
    assert planned.flops == counter.total


def recorded(name, variant, case):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return next(row["ratio_to_plain"] for row in rows if (row["variant"], row["case"]) == (variant, case))


@pytest.mark.parametrize(
    ("way", "name", "variant", "case"),
    [
        ("in_place", "shapo_update", "ShaPO, selective, in_place", "one update"),
        ("delta", "shapo_update", "ShaPO, selective, delta", "one update"),
        ("reuse", "reused_prefix", "ShaPO, reuse_prefix", "upper quarter"),
    ],
)
def test_the_price_is_within_15_percent_of_the_recorded_one(way, name, variant, case):
    of_benchmark = {
        "shapo_update": ({"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 7}, 7, 128),
        "reused_prefix": ({"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12}, 8, 64),
    }
    shape, heads, length = of_benchmark[name]
    config = LlamaConfig(vocab_size=4096, num_attention_heads=heads, **shape)
    settings = load(length=length, prompt=length // 2, percent=1.0, depth=0.25)
    price = trace_update(config, way, settings).flops / trace_update(config, "plain", settings).flops
    assert price == pytest.approx(recorded(name, variant, case), rel=0.15)


def test_a_lora_of_few_layers_takes_less_than_one_of_all():
    few = trace_update(LlamaConfig(**SHAPE), "lora", load(lora=Lora.parse("r=4,targets=q_proj")))
    every = trace_update(LlamaConfig(**SHAPE), "lora", load(lora=Lora.parse("r=4")))
    assert few.largest[STATES] < every.largest[STATES]
    assert few.peak < every.peak
