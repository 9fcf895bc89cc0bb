"""The subspace update in Triton: launchers of subspace_kernels.py; see :mod:`shapo_kernels.ops.subspace_update`.

Every function takes all layers in one or two launches, whatever their number and dtypes, and waits for nothing. A whole
perturbation (`squared_norms` 2, `perturbation_scale` 1, `perturb_` 2, `restore_` 1) is six.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from .subspace_kernels import (
    add_kernel,
    gather_kernel,
    perturb_kernel,
    restore_kernel,
    scale_kernel,
)
from .tables import BLOCK, DTYPES, LayerTable, layer_table, whole_table

#: Partial sums that the second stage takes at a time.
CHUNK = 1024
NORMS = {"global": 0, "layer": 1, "none": 2}
#: In the place of a dtype's number: weights are compared as they are.
KEEP = -1

# No fused multiply-add: a product is rounded before it is added, so that weights agree with PyTorch's to the bit.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def gather_into(
    sources: list[Tensor], indices: list[Tensor], axes: list[int], values: list[Tensor], squared_norms: Tensor
) -> None:
    with torch.cuda.device_of(sources[0]):
        table = layer_table(sources, indices, axes, values, None)
        _add(table, _gather(table), squared_norms)


def selected_squared_norms(sources: list[Tensor], indices: list[Tensor], axes: list[int]) -> Tensor:
    with torch.cuda.device_of(sources[0]):
        table = layer_table(sources, indices, axes, None, None)
        return _add(table, _gather(table), _doubles(table, table.layers))


def squared_norms(values: list[Tensor]) -> Tensor:
    with torch.cuda.device_of(values[0]):
        loadable = [_loadable(value) for value in values]
        table = whole_table(loadable)
        return _add(table, _gather(table), _doubles(table, table.layers))


def perturbation_scale(
    squared_norms: Tensor, rho: Tensor, weight_squared_norms: Tensor | None, norm: str, eta: float
) -> Tensor:
    with torch.cuda.device_of(squared_norms):
        layers = squared_norms.numel()
        scale = torch.empty(layers, dtype=torch.float64, device=squared_norms.device)
        scale_kernel[(layers,)](
            squared_norms.contiguous(),
            layers,
            rho.contiguous(),
            rho if weight_squared_norms is None else weight_squared_norms.contiguous(),
            scale,
            *_two_floats(eta),
            NORMS[norm],
            int(weight_squared_norms is not None),
            CHUNK=CHUNK,
            **OPTIONS,
        )
    return scale


def perturb_(
    weights: list[Tensor],
    indices: list[Tensor],
    axes: list[int],
    directions: list[Tensor],
    scale: Tensor,
    backups: list[Tensor],
    compute_dtype: torch.dtype | None,
) -> Tensor:
    with torch.cuda.device_of(weights[0]):
        table = layer_table(weights, indices, axes, directions, backups)
        partials = _doubles(table, 3 * table.blocks)
        if table.blocks:
            perturb_kernel[(table.blocks,)](
                table.fields,
                table.layers,
                table.blocks,
                scale.contiguous(),
                KEEP if compute_dtype in (None, torch.float64) else DTYPES.index(compute_dtype),
                partials,
                PATH=table.path,
                DTYPE=table.dtype,
                BLOCK=BLOCK,
                **OPTIONS,
            )
        return _add(table, partials, _doubles(table, table.layers, 3))


def restore_(weights: list[Tensor], indices: list[Tensor], axes: list[int], backups: list[Tensor]) -> None:
    with torch.cuda.device_of(weights[0]):
        table = layer_table(weights, indices, axes, None, backups)
        if table.blocks:
            restore_kernel[(table.blocks,)](
                table.fields,
                table.layers,
                PATH=table.path,
                DTYPE=table.dtype,
                BLOCK=BLOCK,
                **OPTIONS,
            )


def _gather(table: LayerTable) -> Tensor:
    partials = _doubles(table, table.blocks)
    if table.blocks:
        gather_kernel[(table.blocks,)](
            table.fields,
            table.layers,
            partials,
            PATH=table.path,
            DTYPE=table.dtype,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return partials


def _add(table: LayerTable, partials: Tensor, sums: Tensor) -> Tensor:
    columns = sums.numel() // table.layers
    add_kernel[(table.layers,)](
        table.fields, table.layers, table.blocks, partials, sums, COLUMNS=columns, CHUNK=CHUNK, **OPTIONS
    )
    return sums


def _loadable(value: Tensor) -> Tensor:
    """Contiguous, beginning on 16 bytes."""
    value = value.contiguous()
    return value if value.data_ptr() % 16 == 0 else value.clone()


def _doubles(table: LayerTable, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=table.fields.device)


def _two_floats(x: float) -> tuple[Any, Any]:
    """x as a float32 and what that leaves over: Triton hands floats to kernels as float32."""
    (high,) = struct.unpack("f", struct.pack("f", x))
    return high, x - high
