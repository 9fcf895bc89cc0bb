r"""Perturbing a layer's selected neurons without writing its weight, and the gradient of that perturbation alone.

    y' = y + x[..., S] D^T            dL/dD = dy^T x[..., S]            (tokens flattened)

The first is the forward of a layer whose weight is `W + D` on the neurons S: nothing was changed, so it is exact to
undo. The second is the gradient of the loss on those neurons. Both cost about |S| / intermediate_size of the layer.

Both are one gather and one matrix product of PyTorch's, on every device. On CUDA the gathered features are padded to a
multiple of 16: the matrix library then loads 16 bytes at a time and uses tensor cores, whatever the number of neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..interop.torch_private import without_view
from ._checks import (
    check_device,
    check_first_order,
    check_floating,
    check_index,
    check_switches,
    compute_dtype_of,
    may_overlap,
)
from ._memory import remembered

ALIGNMENT = 16


def neuron_update(
    output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None = None, *, in_place: bool = False
) -> Tensor:
    r"""`output + input[..., index] @ direction.T`, differentiable in all three tensors.

    Args:
        output: `[..., out_features]`, the layer's output with its weight as it is.
        input: `[..., in_features]`, the layer's input; any floating dtype, rounded to the output's for the product.
        direction: `[out_features, k]`, any stride, any floating dtype; rounded to the output's for the product.
        index: int64 `[k]`, the selected input features, in any order; `None` for all of them.
        in_place: write the result to `output`. Only if nothing else needs its old values: no operation before it may
            have saved its output for a backward pass (a linear layer does not). Ignored while `torch.compile` traces.

    Returns:
        A tensor of the output's shape and dtype: a new one, or `output` itself with `in_place`. Sums are float32 on
        CUDA for 16-bit dtypes; float32 products follow PyTorch's TF32 settings.

    Raises:
        TypeError: a tensor that is not floating point, an index that is not int64.
        ValueError: shapes or devices that do not fit; `in_place` with an output that overlaps itself, or that is a
            leaf which requires grad.
        IndexError: on the CPU, an index that is out of range (elsewhere the device asserts it).
        RuntimeError: in a backward pass with `create_graph=True`, if the direction requires grad.
    """
    _check_neurons(output, input, direction, index)
    check_switches(in_place=in_place)
    in_place = in_place and not torch.compiler.is_compiling()
    if in_place and (may_overlap(output) or (output.is_leaf and output.requires_grad)):
        raise ValueError("output overlaps itself or is a leaf that requires grad: use in_place=False")
    factor = remembered(direction, f"factor {output.dtype}", lambda: _padded(direction.detach().to(output.dtype)))
    return _NeuronUpdate.apply(output, input, direction, factor, index, in_place)


def neuron_gradient(grad_output: Tensor, input: Tensor, index: Tensor | None = None) -> Tensor:
    r"""`grad_output.T @ input[..., index]` over all tokens: the gradient of :func:`neuron_update` on its direction.

    Args:
        grad_output: `[..., out_features]`, gradient of the loss on the layer's output.
        input: `[..., in_features]`, rounded to `grad_output`'s dtype first, as the layer does under autocast.
        index: int64 `[k]`, the selected input features, in any order; `None` for all of them.

    Returns:
        `[out_features, k]`, contiguous, in float32 (float64 for float64), which it is accumulated in.

    Raises:
        TypeError, ValueError, IndexError: as :func:`neuron_update`.
    """
    _check_pair("grad_output", grad_output, input, index)
    neurons = input.shape[-1] if index is None else len(index)
    return _gradient(grad_output, _selected(input, index, grad_output.dtype), neurons)


def neuron_tap(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None = None) -> Tensor:
    """`output` itself, with the gradient of :func:`neuron_update` at `direction = 0` flowing to `direction`.

    Args:
        output, input, index: as for :func:`neuron_update`.
        direction: `[out_features, k]` of zeros, for instance one zero that is expanded. Its values are not read,
            except in a gradient of gradients (a gradient penalty), which is right with respect to the input as well.

    Returns:
        A tensor on the memory of `output`, which autograd does not count as a view: it may be written to in place.

    Raises:
        TypeError, ValueError, IndexError: as :func:`neuron_update`.
    """
    _check_neurons(output, input, direction, index)
    return _NeuronTap.apply(output, input, direction, index)


class _NeuronTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
        # Only the selected features are kept for backward: a layer whose weight is frozen saves no input of its own.
        ctx.save_for_backward(_selected(input, index, output.dtype), direction, index)
        ctx.input_shape, ctx.input_dtype = input.shape, input.dtype
        # The same memory, but no view to autograd: the model may write to it in place, and FSDP may hang hooks on it.
        return without_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        selected, direction, index = ctx.saved_tensors
        (grad_output,) = grads
        grad_input = grad_direction = None
        with _no_autocast(grad_output):
            if ctx.needs_input_grad[2]:
                with torch.no_grad():
                    grad_direction = _gradient(grad_output, selected, direction.shape[1]).to(direction.dtype)
            if ctx.needs_input_grad[1] and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # create_graph=True: zero, as the direction is, but with a derivative to it.
                grad_input = _input_gradient(ctx, grad_output, direction.to(grad_output.dtype), index)
        return grad_output, grad_input, grad_direction, None


class _NeuronUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, direction: Tensor, factor: Tensor, index: Tensor | None, in_place: bool
    ) -> Tensor:
        selected = _selected(input, index, output.dtype)
        # Kept only if its gradient may be asked for.
        ctx.save_for_backward(selected if direction.requires_grad else None, factor, index)
        ctx.input_shape, ctx.input_dtype = input.shape, input.dtype
        ctx.direction_dtype, ctx.neurons = direction.dtype, direction.shape[1]
        with _no_autocast(output):
            rows = _rows(output)
            if not in_place:
                # No view to autograd: what comes after the layer may write to it in place.
                return without_view(torch.addmm(rows, selected, factor.t()), output.shape)
            if output.is_contiguous():
                rows.addmm_(selected, factor.t())
            else:
                output.add_((selected @ factor.t()).view(output.shape))
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        selected, factor, index = ctx.saved_tensors
        (grad_output,) = grads
        grad_input = grad_direction = None
        with _no_autocast(grad_output):
            if ctx.needs_input_grad[1]:
                grad_input = _input_gradient(ctx, grad_output, factor[:, : ctx.neurons], index)
            if ctx.needs_input_grad[2]:
                check_first_order("neuron_update", "give it a direction that does not require grad")
                grad_direction = _gradient(grad_output, selected, ctx.neurons).to(ctx.direction_dtype)
        return grad_output, grad_input, grad_direction, None, None, None


def _selected(input: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[tokens, k]` in `dtype`, padded on CUDA."""
    rows = _rows(input)
    return _padded((rows if index is None else rows.index_select(1, index)).to(dtype))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _padded(matrix: Tensor) -> Tensor:
    missing = -matrix.shape[1] % ALIGNMENT
    return pad(matrix, (0, missing)) if missing and matrix.is_cuda else matrix


def _gradient(grad_output: Tensor, selected: Tensor, neurons: int) -> Tensor:
    compute = compute_dtype_of(grad_output.dtype)
    grad = grad_output.reshape(len(selected), grad_output.shape[-1])
    with _no_autocast(grad):
        if grad.is_cuda and grad.dtype != compute:
            product = torch.mm(grad.t(), selected.to(grad.dtype), out_dtype=compute)
        else:
            product = grad.to(compute).t() @ selected.to(grad.dtype).to(compute)
    return product[:, :neurons].contiguous()


def _input_gradient(ctx: Any, grad_output: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
    selected = (grad_output @ direction).to(ctx.input_dtype)
    # Added, not copied: a feature that is selected twice gets both parts.
    return selected if index is None else selected.new_zeros(ctx.input_shape).index_add_(-1, index, selected)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """The products here choose their dtypes themselves."""
    return torch.autocast(tensor.device.type, enabled=False)


def _check_neurons(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> None:
    _check_pair("output", output, input, index)
    check_floating("direction", direction)
    check_device("direction", direction, "output", output)
    expected = (output.shape[-1], input.shape[-1] if index is None else index.numel())
    if tuple(direction.shape) != expected:
        raise ValueError(f"direction has shape {list(direction.shape)}: expected {list(expected)}, [out_features, k]")


def _check_pair(name: str, output: Tensor, input: Tensor, index: Tensor | None) -> None:
    check_floating(name, output)
    check_floating("input", input)
    check_device("input", input, name, output)
    if not output.dim() or output.shape[:-1] != input.shape[:-1] or output.dim() != input.dim():
        raise ValueError(
            f"{name} has shape {list(output.shape)} and input {list(input.shape)}: expected [..., out_features] and "
            "[..., in_features] that differ in their last dimension only"
        )
    if index is not None:
        check_index("index", index, input.shape[-1])
        check_device("index", index, name, output)
