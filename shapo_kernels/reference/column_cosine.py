"""Every neuron's cosine with one direction in plain PyTorch; documented in :mod:`shapo_kernels.ops.column_cosine`.

Works on some neurons at a time, so that no float64 copy of the weight is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24


def column_cosine(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    wide = weight.dtype == torch.float64
    along, neurons = 1 - axis, weight.shape[axis]
    cosines = torch.zeros(neurons, dtype=torch.float64 if wide else torch.float32, device=weight.device)
    if not weight.numel():
        return cosines
    v = direction.to(torch.float64)
    length = v.square().sum().sqrt()
    step = max(1, CHUNK_ELEMENTS // weight.shape[along])
    for start in range(0, neurons, step):
        count = min(step, neurons - start)
        w = weight.narrow(axis, start, count).to(torch.float64)
        w = scaled(w, along) if wide else w
        norms = w.square().sum(along).sqrt() * length
        dots = (w * v.unsqueeze(axis)).sum(along)
        cosines[start : start + count] = torch.where(norms == 0, 0.0, dots / norms)
    return cosines


def scaled(x: Tensor, along: int) -> Tensor:
    """float64 numbers times a power of two, by which the largest along a dimension is near 1: squares then fit."""
    if not x.numel():
        return x
    exponent = torch.frexp(x.abs().amax(along, keepdim=True)).exponent
    # 2^1024 is no number; the smallest subnormal times 2^1023 is large enough.
    return x * torch.exp2(-exponent.double()).clamp(max=2.0**1023)
