"""ShaPO-DPO in plain PyTorch, with micro-batches: `python examples/plain_pytorch.py`."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shapo_kernels as sk

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
model = LlamaForCausalLM(config)
sizes = {name: p.shape[1] for name, p in model.named_parameters() if name.endswith("down_proj.weight")}
opt = sk.ShaPOOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-3), model, sk.Subspace.random(sizes, 5, seed=0), rho=0.1
)
chosen, rejected = torch.randint(1, 64, (8, 16)), torch.randint(1, 64, (8, 16))


def logps(tokens: torch.Tensor) -> torch.Tensor:
    return sk.losses.sequence_logps(model(tokens).logits, tokens)[0]


with torch.no_grad():  # the reference, once for all
    reference = logps(chosen), logps(rejected)

for update in range(5):
    micro_batches = torch.arange(8).chunk(2)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        per_pair = sk.losses.dpo(
            logps(chosen[rows]), logps(rejected[rows]), reference[0][rows], reference[1][rows], beta=0.1
        )
        return per_pair.sum() / 8

    if opt.due:
        with opt.ascent():
            for rows in micro_batches:
                opt.ascend(loss(rows))
    total = 0.0
    with opt.perturbed():
        for rows in micro_batches:
            part = loss(rows)
            part.backward()
            total += part.item()
    opt.step()
    opt.zero_grad()
    print(f"update {update}: loss at theta + eps {total:.4f}, |eps| / |W_S| {opt.stats['relative_radius']:.3f}")
