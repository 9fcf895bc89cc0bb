"""A ShaPO update against a plain DPO update with cached reference log-probabilities, on a Llama of 20 M parameters.

    pytest benchmarks/test_shapo_update.py

With forward = 1 and backward = 2 units a plain update costs 3, a selective ShaPO update 5 (1.67 times), one with the
grad ascent 6. Correctness first: the two ascents must agree before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shapo_kernels as sk
from benchmarks.rows import add, interleaved, ratios, row
from shapo_kernels import losses

PAIRS, TOKENS, ROUNDS = 4, 128, 7


def build_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=448,
        intermediate_size=1216,
        num_hidden_layers=7,
        num_attention_heads=7,
        num_key_value_heads=7,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config)


def make_update(model: Any, ascent: str | None, **options: Any) -> Callable[[], None]:
    """A plain update where `ascent` is None, else a ShaPO update in 1 % of the neurons."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 4096, (2 * PAIRS, TOKENS), generator=generator)
    labels = tokens.clone()
    labels[:, : TOKENS // 2] = -100
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
    subspace = sk.Subspace.random(sizes, 1, seed=0)
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
