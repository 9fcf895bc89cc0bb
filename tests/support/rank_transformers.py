"""What each rank of the test of transformers' tensor parallelism does: one update of a small Llama, and a refusal."""

import torch
from transformers import LlamaForCausalLM

import shapo_kernels as sk
from tests.support.ranks import on_rank

SUBSPACE = {"model.layers.0.mlp.down_proj.weight": [1, 50], "model.layers.1.mlp.down_proj.weight": [90]}


def update(model, **options):
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = sk.ShaPOOptimizer(base, model, sk.Subspace(SUBSPACE), rho=0.1, **options)
    try:
        with opt.ascent():
            opt.ascend(model(tokens, labels=tokens).loss)
        with opt.perturbed():
            model(tokens, labels=tokens).loss.backward()
        opt.step()
        opt.zero_grad()
    finally:
        opt.detach()


def planned(case):
    model = LlamaForCausalLM.from_pretrained(case["model"], tp_plan="auto", dtype=torch.float64)
    try:
        update(model)
        refusal = None
    except RuntimeError as error:
        refusal = str(error)
    update(model, ascent="grad", perturbation="in_place")
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {"refusal": refusal, "weights": {name: weight.detach() for name, weight in weights.items()}}


if __name__ == "__main__":
    on_rank(planned)
