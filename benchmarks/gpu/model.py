"""What delta adds to a whole model's forward pass: the body of a Llama-3.2-3B with random weights, 1 % random neurons.

The head is left out: with its product in the denominator the share would be smaller. Needs transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import shapo_kernels as sk
from benchmarks.gpu.bench import Bench, Case, Run, Variant, any_result

PLAIN = "plain"
# Of ||W_S||: so large that what rounding leaves of an in-place perturbation can be compared with delta.
RELATIVE_RHO = 1.0


def delta_forward(bench: Bench) -> None:
    from transformers import LlamaConfig, LlamaModel

    size = (
        {"hidden_size": 48, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4}
        if bench.small
        else {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    )
    config = LlamaConfig(vocab_size=1024, num_key_value_heads=size["num_attention_heads"] // 3 or 1, **size)
    rows, length = (2, 16) if bench.small else (2, 2048)
    torch.manual_seed(0)
    with torch.device(bench.device):
        plain = LlamaModel(config).bfloat16().eval()
        tokens = torch.randint(0, config.vocab_size, (rows, length))
    before = _forward(plain, tokens)()
    moved = _perturbed(plain, tokens, "in_place")
    expected = _forward(moved, tokens)() - before
    del moved

    def check(inputs: Any, run: Run) -> None:
        moves_as(run, before, expected)

    def delta(inputs: Any) -> Run:
        return _forward(_perturbed(plain, tokens, "delta"), tokens)

    layers, hidden, width = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    bench.compare(
        Case(
            "gpu_delta_forward",
            f"{rows * length} tokens through {layers} blocks of {hidden} x {width}, bfloat16, 1 % of neurons",
            lambda number: None,
            sum(p.nbytes for p in plain.parameters()) if not bench.small else 1 << 20,
            [*bench.ours(delta, check, ", delta"), Variant(PLAIN, lambda _: _forward(plain, tokens), any_result)],
            {"dtype": "bfloat16", "shape": [rows * length, hidden, width, layers]},
            against=PLAIN,
        )
    )


def _forward(model: nn.Module, tokens: Tensor) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return model(tokens, use_cache=False).last_hidden_state

    return run


def _perturbed(plain: nn.Module, tokens: Tensor, perturbation: str) -> nn.Module:
    """A copy that stays at theta + eps; its weights are the original's own memory where nothing writes to them."""
    shared = {} if perturbation == "in_place" else {id(p): p for p in plain.parameters()}
    model = copy.deepcopy(plain, shared)
    sizes = {n: p.shape[1] for n, p in model.named_parameters() if n.endswith("down_proj.weight")}
    subspace = sk.Subspace.random(sizes, 1, seed=0)
    opt = sk.ShaPOOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, subspace,
        rho=RELATIVE_RHO, relative=True, perturbation=perturbation,
    )  # fmt: skip
    few = tokens[:, : min(64, tokens.shape[1])]
    with torch.enable_grad():  # suites run without
        with opt.ascent():
            opt.ascend(model(few, use_cache=False).last_hidden_state.float().square()[..., 0].mean())
        opt.perturb()
    vars(model)["optimizer_that_perturbs_it"] = opt  # kept alive with the model
    return model


def moves_as(run: Run, before: Tensor, expected: Tensor) -> None:
    """Delta moves the outputs in the direction that moving the weights does; the two round at different places."""
    change, wanted = (run() - before).double().flatten(), expected.double().flatten()
    cosine = change @ wanted / (change.norm() * wanted.norm())
    length = change.norm() / wanted.norm()
    if not (bool(cosine > 0.98) and bool((length - 1).abs() < 0.05)):
        raise AssertionError(f"outputs move with cosine {cosine:.3f} and {length:.3f} of the length")
