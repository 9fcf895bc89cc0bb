"""A ShaPO update against a plain DPO update with cached reference log-probabilities, on a Llama of 20 M parameters.

    pytest benchmarks/test_shapo_update.py

With forward = 1 and backward = 2 units a plain update costs 3, a selective ShaPO update 5 (1.67 times), one with the
grad ascent 6, one whose descent reuses the blocks below the selected ones 3 + 2 f, where f is the share of the depth
above. Correctness first: the selective and the grad ascent must agree, and a descent with the blocks reused must have
the gradients of one without to the bit, before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shapo_kernels as sk
from benchmarks.measure import peak_extra_bytes
from benchmarks.rows import add, interleaved, ratios, row
from shapo.models.memory import keep_freed_memory
from shapo_kernels import losses

PAIRS, TOKENS, ROUNDS = 4, 128, 7
# Of a model of twelve blocks: the share of them that is selected, from the top.
BLOCKS, DEPTH_TOKENS, DEPTH_ROUNDS = 12, 64, 6
DEPTHS = {"all blocks": 1.0, "upper half": 0.5, "upper quarter": 0.25, "last block": 1 / BLOCKS}


def build_model(layers: int = 7) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=448,
        intermediate_size=1216,
        num_hidden_layers=layers,
        num_attention_heads=7,
        num_key_value_heads=7,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config)


def make_update(
    model: Any, ascent: str | None, depth: float = 1.0, length: int = TOKENS, **options: Any
) -> Callable[[], None]:
    """A plain update where `ascent` is None; else one with 1 % of all neurons, taken from the upper `depth`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 4096, (2 * PAIRS, length), generator=generator)
    labels = tokens.clone()
    labels[:, : length // 2] = -100
    base = torch.optim.AdamW(model.parameters(), lr=0.0)
    reference = torch.full((PAIRS,), -300.0)

    def loss() -> torch.Tensor:
        logps, _ = losses.sequence_logps(model(tokens).logits, labels)
        return losses.dpo(logps[:PAIRS], logps[PAIRS:], reference, reference, beta=0.1).mean()

    def plain() -> None:
        loss().backward()
        base.step()
        base.zero_grad()

    if ascent is None:
        return plain
    sizes = {name: p.shape[1] for name, p in model.named_parameters() if name.endswith("down_proj.weight")}
    upper = list(sizes)[-round(depth * len(sizes)) :]
    subspace = sk.Subspace.random({name: sizes[name] for name in upper}, len(sizes) / len(upper), seed=0)
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.05, ascent=ascent, **options)

    def shapo() -> None:
        with opt.ascent():
            opt.ascend(loss())
        with opt.perturbed():
            loss().backward()
        opt.step()
        opt.zero_grad()

    shapo.opt = opt  # type: ignore[attr-defined]
    return shapo


def check_agreement(model: Any) -> None:
    """Both ascents find the same gradient; an update with lr = 0 changes no bit."""
    before = [p.detach().clone() for p in model.parameters()]
    norms = []
    for ascent in ("selective", "grad"):
        update: Any = make_update(model, ascent)
        update()
        norms.append(update.opt.stats["grad_norm"])
        update.opt.detach()
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_shapo_update_against_plain_dpo(benchmark: Any) -> None:
    pytest.importorskip("transformers")
    model = build_model()
    check_agreement(model)
    variants = {
        "plain DPO": make_update(model, None),
        "ShaPO, selective, in_place": make_update(model, "selective"),
        "ShaPO, selective, delta": make_update(model, "selective", perturbation="delta"),
        "ShaPO, grad, in_place": make_update(model, "grad"),
    }
    seconds = interleaved(variants, rounds=ROUNDS)
    found = ratios(seconds, "plain DPO")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    shape = f"{millions:.0f} M parameters, {PAIRS} pairs of {TOKENS} tokens"
    add(
        "shapo_update",
        [
            row("shapo_update", "one update", name, times, dtype="float32", shape=shape, ratio_to_plain=found[name])
            for name, times in seconds.items()
        ],
    )
    benchmark.extra_info.update(found)
    benchmark.pedantic(variants["ShaPO, selective, in_place"], rounds=3)


def check_reuse(model: Any, depth: float) -> None:
    """The descent's gradients with the blocks below reused are those without, to the bit."""
    found = []
    for reuse in (False, True):
        update: Any = make_update(model, "selective", depth, DEPTH_TOKENS, perturbation="delta", reuse_prefix=reuse)
        update.opt.zero_grad = lambda: None
        update()
        found.append([p.grad.clone() for p in model.parameters()])
        update.opt.detach()
        model.zero_grad()
    assert all(torch.equal(with_, without) for without, with_ in zip(*found, strict=True))


def test_depth_with_and_without_the_blocks_below_reused(benchmark: Any) -> None:
    pytest.importorskip("transformers")
    kept = keep_freed_memory()
    model = build_model(BLOCKS)
    variants = {"plain DPO": make_update(model, None, length=DEPTH_TOKENS)}
    for name, depth in DEPTHS.items():
        check_reuse(model, depth)
        for reuse in (False, True):
            update = make_update(model, "selective", depth, DEPTH_TOKENS, perturbation="delta", reuse_prefix=reuse)
            variants[f"ShaPO, {name}{', below it reused' if reuse else ''}"] = update
    memory = {name: peak_extra_bytes(run) for name, run in variants.items()}
    seconds = interleaved(variants, rounds=DEPTH_ROUNDS, warmup=0)
    found = ratios(seconds, "plain DPO")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    case = f"{BLOCKS} blocks, {millions:.0f} M parameters, delta, by depth of the selection"
    columns = {"dtype": "float32", "shape": f"{PAIRS} pairs of {DEPTH_TOKENS} tokens", "freed_memory_kept": kept}
    add(
        "shapo_update",
        [
            row("shapo_update", case, name, times, ratio_to_plain=found[name], extra_bytes=memory[name], **columns)
            for name, times in seconds.items()
        ],
    )
    benchmark.extra_info.update(found)
    benchmark.pedantic(variants["ShaPO, upper quarter, below it reused"], rounds=1)
