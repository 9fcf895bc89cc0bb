"""Log-probabilities of labels from hidden states and the head's weight, without `[tokens, V]` logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    check_device,
    check_floating,
    check_ignore_index,
    check_labels,
    check_positive,
    check_switches,
    check_whole,
)
from .linear_head import linear_token_logps as _operator
from .linear_tiles import HeadOptions

__all__ = ["TokenLogps", "linear_token_logps"]


class TokenLogps(NamedTuple):
    """Numbers of each token `[B, T]`, beside its logits; 0 (`False`) where a token does not count.

    Attributes:
        logps: log-probability of the label. The only one that can be differentiated; the others are `None` unless
            they were asked for.
        entropy: in nats.
        mean_logit: mean of the logits over the vocabulary.
        is_top: whether the label is the most likely token (of several, the first).
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top: Tensor | None = None


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
    ignore_index: int = -100,
    group: Any = None,
    shift: int = 1,
    statistics: bool = False,
) -> TokenLogps:
    """Log-probability of each token's label, from the last hidden states and the output embedding.

    `logits = cap((hidden @ weight.T + bias) * scale)` with `cap(x) = softcap * tanh(x / softcap)`, in this order:
    `scale` is Cohere's `logit_scale` or 1 / Granite's `logits_scaling`, `softcap` Gemma 2's
    `final_logit_softcapping`. With `statistics`, also what trainers log of each token's distribution.

    Args:
        hidden: `[B, T, H]`, the input of the model's head.
        weight: `[V, H]`, of the same dtype (any two dtypes under `torch.autocast`, whose dtype they are then
            rounded to). A weight sharded by FSDP2 (DTensor) is gathered once, and its gradient averaged over the ranks.
        labels: integers `[B, T]`. With `shift=1` position t of the result belongs to `labels[:, t + 1]`.
        bias: `[V]`, of the weight's dtype.
        softcap: above 0, or `None`.
        scale: above 0.
        chunk_bytes: bytes that the logits held at once may take. By default 256 MiB, or a 64th of the device's memory
            if that is less. If all logits fit, the backward pass computes none of them again.
        ignore_index: the label of tokens that do not count. Nothing is computed for them.
        group: a process group over whose ranks, in their order, the rows of `weight` (and `bias`) are divided: the
            vocabulary-parallel head of tensor parallelism. `hidden` and `labels`, which hold ids of the whole
            vocabulary, are the same on every rank, and so are the results and the gradient of `hidden`. All ranks
            must call it together, forward and backward.
        shift: 1 if labels lie beside their inputs, 0 if they lie beside the hidden states that predict them.
        statistics: also return entropy, mean logit and `is_top`. Not with `group`.

    Returns:
        :class:`TokenLogps`, float64 for float64 inputs, else float32. Differentiable once, in `hidden`, `weight`
        and `bias`. 16-bit factors are multiplied into float32 logits on CUDA; on CPUs without instructions for them
        they are multiplied as float32; elsewhere into logits of their dtype, as the model's head would. Gradients of
        weight and bias are summed in float32 and rounded once to their dtype. They are left out if autograd does not
        want them (a frozen head; `torch.autograd.grad` with other inputs, as in a selective ascent).

    Raises:
        TypeError: tensors that are not floating point, labels that are not integers, dtypes that differ outside
            autocast.
        ValueError: shapes or devices that do not fit, options out of their range; on the CPU, a label outside
            `[0, V)` that is not `ignore_index` (other devices assert it, and nothing waits for them).
        RuntimeError: in a backward pass with `create_graph=True`.
    """
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    head = describe(hidden, weight, labels, bias, softcap, scale, chunk_bytes, ignore_index, group, shift, statistics)
    recording = torch.is_grad_enabled()
    logps, facts, *_ = _operator(
        hidden,
        # A view, because the engine can be asked about its node and not about a leaf: see linear_head._is_wanted.
        weight.view_as(weight),
        bias,
        labels,
        *head,
        recording and hidden.requires_grad,
        recording and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )
    return TokenLogps(logps, facts[0], facts[1], facts[2].bool()) if statistics else TokenLogps(logps)


def describe(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    chunk_bytes: int | None,
    ignore_index: int,
    group: Any = None,
    shift: int = 1,
    statistics: bool = False,
) -> HeadOptions:
    """The arguments of :func:`linear_token_logps`, checked, as the operators take them."""
    _check_head(hidden, weight, bias)
    check_labels(labels, "hidden", hidden)
    if softcap is not None:
        check_positive("softcap", softcap)
    check_positive("scale", scale)
    if chunk_bytes is not None:
        check_whole("chunk_bytes", chunk_bytes, least=1)
    check_ignore_index(ignore_index)
    check_whole("shift", shift)
    if shift not in (0, 1):
        raise ValueError(f"shift is {shift}: expected 0 or 1")
    check_switches(statistics=statistics)
    if statistics and group is not None:
        raise ValueError("statistics=True with a group: ranks know the statistics of their own part only")
    return HeadOptions(
        ignore_index,
        shift,
        _compute_dtype(hidden, weight),
        float(scale),
        None if softcap is None else float(softcap),
        chunk_bytes,
        None if group is None else group.group_name,
        statistics,
        torch.compiler.is_compiling(),
    )


def gathered(tensor: Tensor) -> Tensor:
    """A DTensor in full, its gradient averaged over the ranks as FSDP2 does."""
    if not torch.distributed.is_available():
        return tensor
    # Asked for by its module's name first: importing DTensor takes a second, and where it is, it has been imported.
    if not type(tensor).__module__.startswith("torch.distributed.tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if hidden.dim() != 3:
        raise ValueError(f"hidden has shape {list(hidden.shape)}: expected [B, T, H]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected [V, {hidden.shape[2]}]")
    check_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check_floating("bias", bias)
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias is {bias.dtype} and weight {weight.dtype}: expected one dtype")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}: expected {list(weight.shape[:1])}")
        check_device("bias", bias, "hidden", hidden)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that the head's inputs have, or are rounded to under autocast (which leaves float64 alone)."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: expected one dtype (or torch.autocast)")
    return hidden.dtype
