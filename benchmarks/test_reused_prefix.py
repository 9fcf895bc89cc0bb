"""What an update costs whose subspace lies above some blocks, with these computed twice and once; and its peak memory.

    pytest benchmarks/test_reused_prefix.py            # all cases
    pytest benchmarks/test_reused_prefix.py -k half    # one; its rows are put beside the others'

A Llama of 42 M parameters and 12 blocks, 1 % of its neurons at random, all of them in the upper blocks of the case.
With forward = 1 and backward = 2 units and f the share of the depth above the lowest selected block, an update costs 5
units of a plain one's 3, and 3 + 2 f where the blocks below are reused. Correctness first: gradients agree to the bit.
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

BLOCKS, PAIRS, TOKENS, ROUNDS = 12, 4, 64, 5
#: The lowest block with selected neurons, and what an update may cost at most, in plain ones; `None`: no promise.
CASES: dict[str, tuple[int, float | None]] = {
    "all blocks": (0, None),
    "upper half": (6, 1.40),
    "upper quarter": (9, 1.20),
    "last block": (11, 1.08),
    "head": (12, 1.10),
}
TWICE, ONCE = "ShaPO, every block twice", "ShaPO, reuse_prefix"


def build_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config)


def subspace_from(model: Any, lowest: int) -> sk.Subspace:
    """As many neurons in every case."""
    if lowest == BLOCKS:
        return sk.Subspace.head(model)
    sizes = {n: p.shape[1] for n, p in model.named_parameters() if n.endswith("down_proj.weight")}
    above = {n: size for n, size in sizes.items() if int(n.split(".")[2]) >= lowest}
    return sk.Subspace.random(above, sum(sizes.values()) / sum(above.values()), seed=0)


class Updates:
    """Plain and ShaPO updates of one model and batch; the learning rate is 0, so that they share the weights."""

    def __init__(self, model: Any, subspace: sk.Subspace) -> None:
        generator = torch.Generator().manual_seed(1)
        self._tokens = torch.randint(0, 4096, (2 * PAIRS, TOKENS), generator=generator)
        self._labels = self._tokens.clone()
        self._labels[:, : TOKENS // 2] = -100
        self._reference = torch.full((PAIRS,), -150.0)
        self._model, self._subspace = model, subspace
        self._base = torch.optim.AdamW(model.parameters(), lr=0.0)

    def _loss(self) -> torch.Tensor:
        logps, _ = losses.sequence_logps(self._model(self._tokens, use_cache=False).logits, self._labels)
        reference = self._reference
        return losses.dpo(logps[:PAIRS], logps[PAIRS:], reference, reference, beta=0.1).mean()

    def plain(self) -> None:
        self._loss().backward()
        self._base.step()
        self._base.zero_grad()

    def shapo(self, *, reuse: bool) -> Callable[[], None]:
        opt = sk.ShaPOOptimizer(self._base, self._model, self._subspace, rho=0.05, reuse_prefix=reuse)

        def update() -> None:
            with opt.ascent():
                opt.ascend(self._loss())
            with opt.perturbed():
                self._loss().backward()
            opt.step()
            opt.zero_grad()

        return update

    def gradients(self, *, reuse: bool) -> list[torch.Tensor]:
        opt = sk.ShaPOOptimizer(self._base, self._model, self._subspace, rho=0.05, reuse_prefix=reuse)
        with opt.ascent():
            opt.ascend(self._loss())
        with opt.perturbed():
            self._loss().backward()
        found = [p.grad for p in self._model.parameters()]
        opt.zero_grad()
        opt.detach()
        return found


@pytest.mark.parametrize("case", CASES)
def test_an_update_with_the_blocks_below_reused(benchmark: Any, case: str) -> None:
    pytest.importorskip("transformers")
    keep_freed_memory()
    lowest, most = CASES[case]
    model = build_model()
    subspace = subspace_from(model, lowest)
    updates = Updates(model, subspace)
    assert all(
        torch.equal(a, b) for a, b in zip(updates.gradients(reuse=True), updates.gradients(reuse=False), strict=True)
    )
    variants = {
        "plain DPO": updates.plain,
        TWICE: updates.shapo(reuse=False),
        ONCE: updates.shapo(reuse=True),
    }
    seconds = interleaved(variants, rounds=ROUNDS)
    peaks = {name: peak_extra_bytes(run) for name, run in variants.items()}
    found = ratios(seconds, "plain DPO")
    parameters = dict(model.named_parameters())
    selected = sum(
        parameters[name].numel() // parameters[name].shape[subspace.axis(name)] * len(index)
        for name, index in subspace.items()
    )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    shape = f"{millions:.0f} M parameters, {PAIRS} pairs of {TOKENS} tokens"
    add(
        "reused_prefix",
        [
            row(
                "reused_prefix",
                case,
                name,
                times,
                dtype="float32",
                shape=shape,
                ratio_to_plain=found[name],
                extra_bytes=peaks[name],
            )
            for name, times in seconds.items()
        ],
    )
    benchmark.extra_info.update(found)
    # Where memory is: directions, backups and eps of the selected elements, and the head's weight where it moves.
    assert peaks[ONCE] <= peaks["plain DPO"] + 3 * 4 * selected + 4 * model.lm_head.weight.numel()
    assert most is None or found[ONCE] <= most, found
    benchmark.pedantic(variants[ONCE], rounds=1)
