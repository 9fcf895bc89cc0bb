"""What delta adds to a forward pass, on the CPU, told from nothing to one per cent.

    python -m benchmarks.delta                     # a minute and a half

A Llama of 4 blocks with 1 % of its neurons perturbed, and the same weights plain, one forward pass of 512 tokens after
the other on one thread. The two go first by turns; a ratio is of two passes of each, so that the order cancels, and
processor time leaves out what others take. The row has the median ratio and its 95 % bootstrap interval.
"""

from __future__ import annotations

import copy
import random
import statistics
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import shapo_kernels as sk
from benchmarks.rows import row, write

SECONDS, DRAWS = 75.0, 1000


def perturbed(plain: nn.Module, tokens: Tensor) -> tuple[nn.Module, sk.ShaPOOptimizer]:
    """A model on the same weights that stays at theta + eps, and the optimizer that holds it there."""
    model = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    sizes = {name: p.shape[1] for name, p in model.named_parameters() if name.endswith("down_proj.weight")}
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = sk.ShaPOOptimizer(base, model, sk.Subspace.random(sizes, 1, seed=0), rho=0.05, perturbation="delta")
    with opt.ascent():
        opt.ascend(model(tokens[:, :64], use_cache=False).last_hidden_state.square().mean())
    opt.perturb()
    return model, opt


@torch.no_grad()
def seconds(model: nn.Module, tokens: Tensor) -> float:
    start = time.process_time()
    model(tokens, use_cache=False)
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, inner, blocks = 512, 1536, 4
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=256,
    )  # fmt: skip
    plain = LlamaModel(config).eval()
    tokens = torch.randint(0, 256, (1, 512))
    moved, opt = perturbed(plain, tokens)
    took: dict[nn.Module, list[float]] = {plain: [], moved: []}
    for model in (plain, moved) * 3:
        seconds(model, tokens)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for model in (plain, moved, moved, plain):
            took[model].append(seconds(model, tokens))
    opt.restore()
    both = [[a + b for a, b in zip(took[m][::2], took[m][1::2], strict=True)] for m in (moved, plain)]
    ratios = [ours / other for ours, other in zip(*both, strict=True)]
    generator = random.Random(0)
    drawn = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    found = {
        "ratio_to_plain": statistics.median(ratios),
        "ratio_low": drawn[DRAWS // 40],
        "ratio_high": drawn[-DRAWS // 40],
        "shape": [tokens.shape[1], width, inner, blocks],
        "dtype": "float32",
    }
    case = f"{tokens.shape[1]} tokens through {blocks} blocks of {width} x {inner}, 1 % of neurons, one thread"
    variants = (("shapo_kernels, delta", moved, found), ("plain", plain, {"ratio_to_plain": 1.0}))
    rows = [row("delta_forward", case, name, took[model], **more) for name, model, more in variants]
    write("delta_forward", rows)
    print(
        f"{found['ratio_to_plain']:.4f} ({found['ratio_low']:.4f} to {found['ratio_high']:.4f}), {len(ratios)} ratios"
    )


if __name__ == "__main__":
    main()
