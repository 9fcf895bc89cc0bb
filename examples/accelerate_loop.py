"""The same update under Accelerate, with gradient accumulation: `accelerate launch examples/accelerate_loop.py`."""

import torch
from accelerate import Accelerator
from torch import nn

import shapo_kernels as sk

torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
loader = torch.utils.data.DataLoader(data, batch_size=8)
model, loader = accelerator.prepare(model, loader)
opt = sk.ShaPOOptimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2), model, sk.Subspace({"2.weight": [3, 9]}), rho=0.1
)
opt = accelerator.prepare(opt)
shapo = opt.optimizer  # what Accelerate has wrapped

batches = list(loader)
for update, micro_batches in enumerate(zip(batches[::2], batches[1::2], strict=True)):

    def loss(batch: list[torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    with shapo.ascent():
        for batch in micro_batches:
            shapo.ascend(loss(batch))
    with shapo.perturbed():
        for batch in micro_batches:
            accelerator.backward(loss(batch))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    accelerator.print(f"update {update}: {shapo.stats['epsilon_norm']:.3f}")
