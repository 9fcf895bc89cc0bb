"""Accelerate's own accumulation in bfloat16, a perturbation for each micro-batch: `accelerate launch` this file."""

import torch
from accelerate import Accelerator
from torch import nn

import shapo_kernels as sk

torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16", gradient_accumulation_steps=4)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
model, loader = accelerator.prepare(model, torch.utils.data.DataLoader(data, batch_size=4))
base = torch.optim.AdamW(model.parameters(), lr=1e-2)
shapo = sk.ShaPOOptimizer(base, model, sk.Subspace({"2.weight": [3, 9]}), rho=0.1)
opt = accelerator.prepare(shapo)

for x, y in loader:
    with accelerator.accumulate(model):
        with shapo.ascent():
            shapo.ascend((model(x) - y).square().mean())
        with shapo.perturbed():
            accelerator.backward((model(x) - y).square().mean())  # divides by the number of micro-batches
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
accelerator.print(f"{shapo.updates} updates, cosine of what bfloat16 left of eps {shapo.stats['realised_cosine']:.3f}")
