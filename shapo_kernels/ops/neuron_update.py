r"""Perturbing a layer's selected neurons without writing its weight, and the gradient of that perturbation alone.

    y' = y + x[..., S] D^T            dL/dD = dy^T x[..., S]            (tokens flattened)

The first is the forward of a layer whose weight is ``W + D`` on the neurons S: exact to undo, because nothing was
changed. The second is the gradient of the loss on those neurons, at about |S| / intermediate_size of the price of a
full weight gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from ._checks import check_first_order
from .subspace_update import compute_dtype_of


def neuron_update(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None = None) -> Tensor:
    r"""``output + input[..., index] @ direction.T``, differentiable in all three tensors.

    Args:
        output: ``[..., out_features]``, the layer's output with its weight as it is.
        input: ``[..., in_features]``, the layer's input.
        direction: ``[out_features, k]``, any stride, any floating-point dtype; rounded to the output's dtype for the
            product.
        index: int64 ``[k]``, the selected input features; ``None`` for all of them.

    Returns:
        A new tensor like ``output``.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: in a backward pass with ``create_graph=True``, where the
            direction requires grad.
    """
    _check_neurons(output, input, direction, index)
    return _NeuronUpdate.apply(output, input, direction, index)


def neuron_gradient(grad_output: Tensor, input: Tensor, index: Tensor | None = None) -> Tensor:
    r"""``grad_output.T @ input[..., index]`` over all tokens: ``[out_features, k]``, accumulated in float32 (float64
    for float64).

    Args:
        grad_output: ``[..., out_features]``, gradient of the loss on the layer's output.
        input: ``[..., in_features]``, rounded to ``grad_output``'s dtype first, as the layer does under autocast.
        index: int64 ``[k]``, the selected input features; ``None`` for all of them.
    """
    if grad_output.dim() == 1:
        grad_output, input = grad_output.unsqueeze(0), input.unsqueeze(0)
    return backends.function(grad_output.device, "neuron_gradient")(grad_output, input, index)


def neuron_tap(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None = None) -> Tensor:
    """``output`` itself, with the gradient of :func:`neuron_update` at ``direction = 0`` flowing to ``direction``.

    The direction must be zero, an expanded one for instance. A gradient of gradients with respect to the input, as in a
    gradient penalty, is right as well.
    """
    _check_neurons(output, input, direction, index)
    return _NeuronTap.apply(output, input, direction, index)


class _NeuronTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
        # Only the selected features are kept for backward: a layer whose weight is frozen saves no input of its own.
        ctx.save_for_backward(input if index is None else input.index_select(-1, index), direction, index)
        ctx.input_shape, ctx.input_dtype = input.shape, input.dtype
        ctx.direction_dtype = direction.dtype
        # The same memory, but no view to autograd: the model may write to it in place, and FSDP may hang hooks on it.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        selected, direction, index = ctx.saved_tensors
        (grad_output,) = grads
        grad_input = grad_direction = None
        with _no_autocast(grad_output):
            if ctx.needs_input_grad[2]:
                with torch.no_grad():
                    grad_direction = neuron_gradient(grad_output, selected).to(ctx.direction_dtype)
            if ctx.needs_input_grad[1] and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # create_graph=True: zero, as the direction is, but with a derivative to it.
                grad_input = _input_gradient(ctx, grad_output, direction.to(grad_output.dtype), index)
        return grad_output, grad_input, grad_direction, None


class _NeuronUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
        rounded = direction.to(output.dtype)
        needs_direction = direction.requires_grad
        # Only what a gradient will be asked for is copied together; else the kernel reads the features where they lie.
        selected, places = input, index
        if needs_direction and index is not None:
            selected, places = input.index_select(-1, index), None
        ctx.save_for_backward(selected if needs_direction else None, rounded, index)
        ctx.input_shape, ctx.input_dtype, ctx.direction_dtype = input.shape, input.dtype, direction.dtype
        with _no_autocast(output):
            return backends.function(output.device, "neuron_update")(output, selected, rounded, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        selected, rounded, index = ctx.saved_tensors
        (grad_output,) = grads
        grad_input = grad_direction = None
        with _no_autocast(grad_output):
            if ctx.needs_input_grad[1]:
                grad_input = _input_gradient(ctx, grad_output, rounded, index)
            if ctx.needs_input_grad[2]:
                check_first_order("neuron_update", "give it a direction that does not require grad")
                grad_direction = neuron_gradient(grad_output, selected).to(ctx.direction_dtype)
        return grad_output, grad_input, grad_direction, None


def _input_gradient(ctx: Any, grad_output: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
    selected = (grad_output @ direction).to(ctx.input_dtype)
    return selected if index is None else selected.new_zeros(ctx.input_shape).index_copy_(-1, index, selected)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """The products here choose their dtypes themselves."""
    return torch.autocast(tensor.device.type, enabled=False)


def _check_neurons(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> None:
    selected = input.shape[-1] if index is None else index.numel()
    expected = (output.shape[-1], selected)
    if tuple(direction.shape) != expected:
        raise ValueError(f"direction has shape {list(direction.shape)}: expected {list(expected)}, [out_features, k]")
    if output.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"output {list(output.shape)} and input {list(input.shape)} differ before their last dimension"
        )


def fake_neuron_update(output: Tensor, input: Tensor, direction: Tensor, index: Tensor | None) -> Tensor:
    """What a backend's ``neuron_update`` returns, without its values: for tracing."""
    return torch.empty_like(output, memory_format=torch.contiguous_format)


def fake_neuron_gradient(grad_output: Tensor, input: Tensor, index: Tensor | None) -> Tensor:
    """What a backend's ``neuron_gradient`` returns, without its values: for tracing."""
    neurons = input.shape[-1] if index is None else index.shape[0]
    return grad_output.new_empty(grad_output.shape[-1], neurons, dtype=compute_dtype_of(grad_output.dtype))


if native.has_cpu or native.has_cuda:
    torch.library.register_fake("shapo_kernels::neuron_update", fake_neuron_update)
    torch.library.register_fake("shapo_kernels::neuron_gradient", fake_neuron_gradient)
