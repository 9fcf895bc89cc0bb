"""The cosine of every neuron with one direction: the score by which a safety probe selects its subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, reference
from ..reference.column_cosine import scaled
from ._checks import check_axis, check_device, check_floating, compute_dtype_of


def column_cosine(weight: Tensor, direction: Tensor, *, axis: int = 1) -> Tensor:
    r"""Cosine of each neuron's value vector with a direction, in one pass over the weight.

    .. math:: c_i = \frac{\langle W_i, v \rangle}{\|W_i\|_2 \, \|v\|_2}, \qquad W_i = W_{:, i} \text{ (axis 1)},
              \; W_{i, :} \text{ (axis 0)}

    A neuron of norm zero, or a direction of norm zero, gives 0; a NaN or an infinity in a neuron gives NaN. Norms
    neither overflow nor underflow, whatever the size of the numbers.

    Args:
        weight: `[hidden, neurons]` for axis 1 (`nn.Linear`), `[neurons, hidden]` for axis 0 (`Conv1D`); any
            stride.
        direction: `[hidden]`, floating point.
        axis: the axis that the neurons lie on.

    Returns:
        `[neurons]` in float32, float64 for a float64 weight.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that do not fit, several devices, another axis.
    """
    check_floating("weight", weight)
    check_floating("direction", direction)
    check_device("direction", direction, "weight", weight)
    check_axis("axis", axis)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected two dimensions")
    hidden = weight.shape[1 - axis]
    if list(direction.shape) != [hidden]:
        raise ValueError(f"direction has shape {list(direction.shape)}: expected [{hidden}], the length of a neuron")
    # Squares of float64 numbers can leave the range of float64, which the kernels sum in; the reference scales them.
    wide = weight.dtype == torch.float64
    function = reference.column_cosine if wide else backends.function(weight.device, "column_cosine")
    with torch.no_grad():
        near_one = scaled(direction.double(), 0)
        return function(weight, near_one.to(compute_dtype_of(weight.dtype)), axis)
