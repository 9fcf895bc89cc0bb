"""Every neuron's cosine with one direction in plain PyTorch; documented in :mod:`shapo_kernels.ops.column_cosine`."""

from __future__ import annotations

import torch
from torch import Tensor


def column_cosine(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.to(torch.float64)
    v = direction.to(torch.float64)
    along = 1 - axis
    dots = (w * v.unsqueeze(axis)).sum(along)
    norms = w.square().sum(along).sqrt() * v.square().sum().sqrt()
    return torch.where(norms == 0, 0.0, dots / norms).to(compute)
