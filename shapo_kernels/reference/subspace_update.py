"""The subspace update in plain PyTorch; documented in :mod:`shapo_kernels.ops.subspace_update`."""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import HALVES, mixed, round_stochastically


def gather_into(
    sources: list[Tensor], indices: list[Tensor], axes: list[int], values: list[Tensor], squared_norms: Tensor
) -> None:
    for source, index, axis, value in zip(sources, indices, axes, values, strict=True):
        value.copy_(source.index_select(axis, index))
    squared_norms.copy_(_squared_norms(values, squared_norms))


def squared_norms(values: list[Tensor]) -> Tensor:
    return _squared_norms(values, torch.empty(0, dtype=torch.float64, device=values[0].device))


def selected_squared_norms(sources: list[Tensor], indices: list[Tensor], axes: list[int]) -> Tensor:
    return squared_norms(
        [source.index_select(axis, index) for source, index, axis in zip(sources, indices, axes, strict=True)]
    )


def _squared_norms(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([value.double().square().sum() for value in values]).to(like.device)


def perturbation_scale(
    squared_norms: Tensor, rho: Tensor, weight_squared_norms: Tensor | None, norm: str, eta: float
) -> Tensor:
    total = squared_norms.sum()
    if norm == "none":
        return torch.where(total.isfinite(), rho, 0.0)
    squares = squared_norms if norm == "layer" else total.expand_as(squared_norms)
    radius = rho
    if weight_squared_norms is not None:
        radius = rho * (weight_squared_norms if norm == "layer" else weight_squared_norms.sum()).sqrt()
    usable = squares.isfinite() & (squares > 0) & radius.isfinite()
    return torch.where(usable, radius / (squares.sqrt() + eta), 0.0)


def perturb_(
    weights: list[Tensor],
    indices: list[Tensor],
    axes: list[int],
    directions: list[Tensor],
    scale: Tensor,
    backups: list[Tensor],
    compute_dtype: torch.dtype | None,
    rounding_key: int | None = None,
) -> Tensor:
    # Every backup is full before anything is written: an interrupt may come between any two lines here.
    for weight, index, axis, backup in zip(weights, indices, axes, backups, strict=True):
        backup.copy_(weight.index_select(axis, index))
    realised = []
    for layer, (weight, index, axis, direction, s, old) in enumerate(
        zip(weights, indices, axes, directions, scale, backups, strict=True)
    ):
        step = torch.where(s == 0, 0.0, s.to(direction.dtype) * direction)
        new = old.to(direction.dtype) + step
        if rounding_key is not None and weight.dtype in HALVES:
            new = round_stochastically(new, weight.dtype, key=mixed(rounding_key ^ layer))
        new = torch.where(s == 0, old, new.to(weight.dtype))
        weight.index_copy_(axis, index, new)
        computed = compute_dtype or weight.dtype
        moved = torch.where(s == 0, 0.0, new.to(computed).double() - old.to(computed).double())
        realised.append(torch.stack([moved.square().sum(), (moved * step).sum(), old.double().square().sum()]))
    return torch.stack(realised)


def restore_(weights: list[Tensor], indices: list[Tensor], axes: list[int], backups: list[Tensor]) -> None:
    for weight, index, axis, backup in zip(weights, indices, axes, backups, strict=True):
        weight.index_copy_(axis, index, backup)
