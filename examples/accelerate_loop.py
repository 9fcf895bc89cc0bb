"""One perturbation for all micro-batches of an update, under Accelerate: `accelerate launch` this file.

Accelerate wraps the optimizer: `shapo` is what has `ascent` and `perturbed`, `opt` is what steps.
"""

import contextlib

import torch
from accelerate import Accelerator
from torch import nn

import shapo_kernels as sk

torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
model, loader = accelerator.prepare(model, torch.utils.data.DataLoader(data, batch_size=8))
base = torch.optim.AdamW(model.parameters(), lr=1e-2)
shapo = sk.ShaPOOptimizer(base, model, sk.Subspace({"2.weight": [3, 9]}), rho=0.1)  # around the prepared model
opt = accelerator.prepare(shapo)

batches = list(loader)
for update, micro_batches in enumerate(zip(batches[::2], batches[1::2], strict=True)):

    def loss(batch: list[torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    with shapo.ascent():
        for batch in micro_batches:
            shapo.ascend(loss(batch))
    with shapo.perturbed():
        for number, batch in enumerate(micro_batches):
            with contextlib.nullcontext() if number == 1 else accelerator.no_sync(model):  # reduce gradients once
                accelerator.backward(loss(batch))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    accelerator.print(f"update {update}: {shapo.stats['epsilon_norm']:.3f}")
