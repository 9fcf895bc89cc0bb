"""The neuron update and its gradient in plain PyTorch; documented in :mod:`shapo_kernels.ops.neuron_update`."""

from __future__ import annotations

import torch
from torch import Tensor


def neuron_update(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
    selected = input if index is None else input.index_select(-1, index)
    return output + (selected.to(output.dtype) @ direction.to(output.dtype).t())


def neuron_gradient(grad_output: Tensor, input: Tensor, index: Tensor | None) -> Tensor:
    selected = input if index is None else input.index_select(-1, index)
    compute = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    # The input is rounded to the output's dtype first: under autocast that is the value the layer computed with.
    rounded = selected.to(grad_output.dtype).to(compute)
    return grad_output.flatten(0, -2).to(compute).t() @ rounded.flatten(0, -2)
