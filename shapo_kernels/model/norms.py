"""Norms and sums over selected weights, whole ones also where ranks hold or compute with parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..distributed import total
from .targets import Target


def selected_weight_squared_norms(targets: Sequence[Target]) -> Tensor:
    """||W_S||^2 of each target, float64 ``[n]``: of the whole weight (a collective), NaN where it is quantised."""
    if any(target.quantised for target in targets):
        known = [target for target in targets if not target.quantised]
        norms = iter(selected_weight_squared_norms(known) if known else ())
        nan = torch.full((), torch.nan, dtype=torch.float64, device=targets[0].parameter.device)
        return torch.stack([nan if target.quantised else next(norms) for target in targets])
    parts = [target.held_neurons() for target in targets]
    squares = ops.selected_squared_norms(
        [rows for rows, _ in parts], [index for _, index in parts], [target.axis for target in targets]
    )
    return total(squares, [target.layout.held_over for target in targets])


def total_over_parts(sums: Tensor, targets: Sequence[Target]) -> Tensor:
    """Sums over what each rank computes with, a row for each target -> sums over whole weights (a collective)."""
    return total(sums, [target.layout.computed_over for target in targets])
