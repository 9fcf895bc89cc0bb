r"""The subspace update: gather the selected gradient and its norm, scale, perturb in place, restore.

    eps = rho * g_S / (||g_S||_2 + eta),      W[S] <- W[S] + eps,      W[S] <- the bits it had

(Foret et al., arXiv:2010.01412, eq. 2, restricted to a subspace S as in ShaPO, arXiv:2602.07340.) Each function takes
every layer in one call. A layer l is a 2-D tensor, an int64 index of its selected neurons and the axis they lie on. Its
*compact* form is what `index_select(axis, index)` gives: `[rows, k]` for axis 1, `[k, columns]` for axis 0. The
compute dtype is float64 if the layer is float64, else float32. Squared norms, radii and scales are float64 tensors on
the layers' device, so that nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference
from ..interop.torch_private import is_fake
from ._checks import (
    check_all_floating,
    check_all_on_one_device,
    check_axis,
    check_choice,
    check_device,
    check_index,
    check_lengths,
    check_not_negative,
    check_tensor,
    check_whole,
    check_written,
    compute_dtype_of,
)

NORMS = ("global", "layer", "none")


def gather(
    sources: Sequence[Tensor],
    indices: Sequence[Tensor],
    axes: Sequence[int],
    *,
    values: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    r"""The selected neurons of each layer, compact, and their squared norms.

    .. math:: v_l = \mathrm{source}_l[S_l], \qquad n_l = \sum v_l^2

    Args:
        sources: n floating-point tensors `[rows, columns]` of any stride (gradients, usually).
        indices: n int64 tensors of neuron indices, sorted for speed.
        axes: n times 0 (neurons are rows) or 1 (neurons are columns).
        values: n contiguous compact tensors in the compute dtype to write to; by default they are made.

    Returns:
        `values`: n contiguous tensors in the compute dtype, and the squared norms `[n]` in float64, accumulated in
        float64 in an order that does not depend on the number of threads.

    Raises:
        TypeError: a tensor that is not floating point, an index that is not int64, `values` of another dtype.
        ValueError: lists of different lengths, tensors that are not 2-D or not on one device, an axis other than 0, 1,
            `values` of another shape.
        IndexError: on the CPU, an index that is out of range. On a GPU it reads as NaN, which makes the norm NaN, and
            is never written to (the reference fails a device assertion).
    """
    _check_layers("sources", sources, indices, axes)
    dtypes = [compute_dtype_of(source.dtype) for source in sources]
    if values is not None:
        _check_compact("values", values, sources, indices, axes, dtypes)
    if not sources:
        return [], torch.empty(0, dtype=torch.float64)
    if values is None:
        values = [
            torch.empty(_compact_shape(source, index, axis), dtype=dtype, device=source.device)
            for source, index, axis, dtype in zip(sources, indices, axes, dtypes, strict=True)
        ]
    values = list(values)
    squares = torch.empty(len(sources), dtype=torch.float64, device=sources[0].device)
    backends.function(sources[0].device, "gather_into")(list(sources), list(indices), list(axes), values, squares)
    torch.autograd.graph.increment_version([*values, squares])
    return values, squares


def squared_norms(values: Sequence[Tensor]) -> Tensor:
    """The squared 2-norm of each tensor: `[n]`, float64, accumulated in float64 in a fixed order.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: tensors on several devices.
    """
    check_all_floating("values", values)
    check_all_on_one_device("values", values, "values", values)
    if not values:
        return torch.empty(0, dtype=torch.float64)
    return backends.function(values[0].device, "squared_norms")(list(values))


def selected_squared_norms(sources: Sequence[Tensor], indices: Sequence[Tensor], axes: Sequence[int]) -> Tensor:
    """The squared norms that :func:`gather` returns, without writing the compact values. Raises as it does."""
    _check_layers("sources", sources, indices, axes)
    if not sources:
        return torch.empty(0, dtype=torch.float64)
    return backends.function(sources[0].device, "selected_squared_norms")(list(sources), list(indices), list(axes))


def perturbation_scale(
    squared_norms: Tensor,
    rho: Tensor,
    *,
    weight_squared_norms: Tensor | None = None,
    norm: str = "global",
    eta: float = 1e-12,
) -> Tensor:
    r"""The factor that turns each layer's gradient into its perturbation, on the device.

    .. math:: s_l = \frac{\rho_l}{N_l + \eta}, \qquad N_l = \sqrt{\textstyle\sum_m n_m} \text{ (global)}, \;
              \sqrt{n_l} \text{ (layer)}; \qquad s_l = \rho_l \text{ (none)}

    With `weight_squared_norms` the radius is relative: rho_l is multiplied by the norm of the weights, over all
    layers for "global", of the layer itself for "layer". If the norm is zero or not finite the scale is 0, so that the
    weights stay as they are; no decision is taken on the host.

    Args:
        squared_norms: n_l, float64 `[n]`.
        rho: radius of each layer, float64 `[n]`.
        weight_squared_norms: squared norms of the selected weights, float64 `[n]`, for a relative radius.
        norm: "global", "layer" or "none".
        eta: added to the norm.

    Raises:
        TypeError: tensors that are not float64.
        ValueError: an unknown norm, an `eta` below 0, shapes or devices that differ, a relative radius with norm
            "none".
    """
    check_tensor("squared_norms", squared_norms)
    _check_per_layer("squared_norms", squared_norms, squared_norms.numel())
    _check_per_layer("rho", rho, squared_norms.numel(), "squared_norms", squared_norms)
    check_choice("norm", norm, NORMS)
    check_not_negative("eta", eta)
    if weight_squared_norms is not None:
        if norm == "none":
            raise ValueError("a relative radius needs a norm: use norm='global' or norm='layer'")
        _check_per_layer(
            "weight_squared_norms", weight_squared_norms, squared_norms.numel(), "squared_norms", squared_norms
        )
        weight_squared_norms = weight_squared_norms.contiguous()
    if not squared_norms.numel():
        return torch.empty_like(rho)
    return backends.function(squared_norms.device, "perturbation_scale")(
        squared_norms.contiguous(), rho.contiguous(), weight_squared_norms, norm, eta
    )


def norms_and_scale(
    values: Sequence[Tensor],
    rho: Tensor,
    *,
    weight_squared_norms: Tensor | None = None,
    norm: str = "global",
    eta: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """:func:`squared_norms` of the directions and their :func:`perturbation_scale`.

    Returns:
        The squared norms and the scale, float64 `[n]` each.

    Raises:
        TypeError, ValueError: as those two.
    """
    squares = squared_norms(values)
    if not values and isinstance(rho, Tensor):
        squares = squares.to(rho.device)
    return squares, perturbation_scale(squares, rho, weight_squared_norms=weight_squared_norms, norm=norm, eta=eta)


def perturb_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    axes: Sequence[int],
    directions: Sequence[Tensor],
    scale: Tensor,
    backups: Sequence[Tensor],
    *,
    compute_dtype: torch.dtype | None = None,
    rounding_key: int | None = None,
) -> Tensor:
    r"""Add `scale_l * directions_l` to the selected neurons in place, keeping their old bits in `backups`.

    .. math:: b_l = W_l[S_l], \qquad W_l[S_l] \leftarrow \mathrm{round}(W_l[S_l] + s_l d_l)

    Only the selected neurons are read and written. A layer whose scale is 0 is not written at all, whatever its
    direction holds. In low precision much of a small perturbation rounds away; the returned sums say how much reached
    the weights: with realised = c(W_new) - c(W_old), where c rounds to `compute_dtype`,

        column 0: ||realised||^2     column 1: <realised, s_l d_l>     column 2: ||W_old[S_l]||^2

    Args:
        weights: n floating-point tensors `[rows, columns]` of any stride, no two of them one tensor.
        indices, axes: as for :func:`gather`; an index twice in one layer is an error of the caller, which the CPU
            detects.
        directions: n contiguous compact tensors in the compute dtype.
        scale: float64 `[n]`.
        backups: n contiguous compact tensors in the weights' dtype, overwritten.
        compute_dtype: the dtype that the weights are used in (autocast's); the weights' own by default.
        rounding_key: a number of 32 bits; bfloat16 and float16 weights are then rounded stochastically:

                round(x) = hi with probability (x - lo) / (hi - lo), else lo,    lo <= x <= hi neighbours in the dtype

            A perturbation far below the spacing of 16-bit weights rounds away to nothing; rounded stochastically its
            expectation is kept, at the price of noise of about sqrt(|eps| * spacing) in each element. The draws are a
            hash of the key, the layer's number and the element's: the same on every device. Computed in plain PyTorch
            on every backend.

    Returns:
        float64 `[n, 3]`.

    Raises:
        TypeError: a dtype other than described. ValueError: a shape or device other than described, a weight whose
        elements share memory or that is given twice; on the CPU, an index twice in one layer. Nothing has been written
        then.
    """
    _check_layers("weights", weights, indices, axes, written=True)
    _check_compact("directions", directions, weights, indices, axes, [compute_dtype_of(w.dtype) for w in weights])
    _check_compact("backups", backups, weights, indices, axes, [w.dtype for w in weights])
    _check_per_layer("scale", scale, len(weights), "weights[0]", weights[0] if weights else scale)
    if rounding_key is not None:
        check_whole("rounding_key", rounding_key, least=0)
    if not weights:
        return torch.empty(0, 3, dtype=torch.float64)
    arguments = list(weights), list(indices), list(axes), list(directions), scale.contiguous(), list(backups)
    if rounding_key is None:
        realised = backends.function(weights[0].device, "perturb_")(*arguments, compute_dtype)
        # Custom operators do not bump version counters by themselves. Without it autograd would silently use changed
        # weights.
        torch.autograd.graph.increment_version([*weights, *backups])
    else:
        realised = reference.perturb_(*arguments, compute_dtype, rounding_key)
    return realised


def restore_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], axes: Sequence[int], backups: Sequence[Tensor]
) -> None:
    """Write the bits kept by :func:`perturb_` back: `W_l[S_l] <- backups_l`.

    Raises:
        TypeError, ValueError: as :func:`perturb_`.
    """
    _check_layers("weights", weights, indices, axes, written=True)
    _check_compact("backups", backups, weights, indices, axes, [w.dtype for w in weights])
    if not weights:
        return
    backends.function(weights[0].device, "restore_")(list(weights), list(indices), list(axes), list(backups))
    torch.autograd.graph.increment_version(list(weights))


def _compact_shape(tensor: Tensor, index: Tensor, axis: int) -> tuple[int, int]:
    return (tensor.shape[0], index.numel()) if axis == 1 else (index.numel(), tensor.shape[1])


def _check_layers(
    name: str, tensors: Sequence[Tensor], indices: Sequence[Tensor], axes: Sequence[int], *, written: bool = False
) -> None:
    check_lengths({name: tensors, "indices": indices, "axes": axes})
    check_all_floating(name, tensors)
    for position, (tensor, index, axis) in enumerate(zip(tensors, indices, axes, strict=True)):
        if tensor.dim() != 2:
            raise ValueError(f"{name}[{position}] has shape {list(tensor.shape)}: expected [rows, columns]")
        if axis.__class__ is not int or axis not in (0, 1):
            check_axis(f"axes[{position}]", axis)
        check_index(f"indices[{position}]", index, tensor.shape[axis], distinct=written)
    check_all_on_one_device(name, tensors, name, tensors)
    check_all_on_one_device("indices", indices, name, tensors)
    if written:
        _check_writable(name, tensors)


def _check_compact(
    name: str,
    compact: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    axes: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> None:
    check_lengths({name: compact, "weights": weights})
    for position, (tensor, weight, index, axis, dtype) in enumerate(
        zip(compact, weights, indices, axes, dtypes, strict=True)
    ):
        if not isinstance(tensor, Tensor):
            check_tensor(f"{name}[{position}]", tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{name}[{position}] is {tensor.dtype}: expected {dtype} for a weight of {weight.dtype}")
        shape = _compact_shape(weight, index, axis)
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}[{position}] has shape {list(tensor.shape)}, strides {list(tensor.stride())}: "
                f"expected a contiguous {list(shape)}"
            )
    check_all_on_one_device(name, compact, "weights", weights)


def _check_per_layer(name: str, tensor: Tensor, layers: int, other_name: str = "", other: Tensor | None = None) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name} is {tensor.dtype}: expected torch.float64")
    if tensor.dim() != 1 or tensor.numel() != layers:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {[layers]}, one for each layer")
    if other is not None:
        check_device(name, tensor, other_name, other)


def _check_writable(name: str, weights: Sequence[Tensor]) -> None:
    places: dict[tuple[int, tuple[int, ...]], int] = {}
    for position, weight in enumerate(weights):
        if not weight.is_contiguous():
            check_written(f"{name}[{position}]", weight)
        if weight.numel() and weight.device.type != "meta" and not is_fake(weight):
            first = places.setdefault((weight.data_ptr(), weight.stride()), position)
            if first != position:
                raise ValueError(f"{name}[{position}] is {name}[{first}] again: pass it once, with all its neurons")
