"""Log-probabilities of responses under a causal language model: from logits, or from hidden states without the logits.

    log p = logit[label] - log sum exp(logit),   summed over a response's tokens

The public functions check and sum; the mathematics is with ``ops.token_logps`` and ``linear_head``, which do the work.
``linear_sequence_logps`` never holds more than a tile of the logits. Log-sum-exp is taken in
fp32 (fp64 for fp64 inputs), sums over tokens in fp64: bf16 sums over 256 tokens are off by 2 and more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from .. import ops
from . import linear_head
from ._checks import check_device, check_floating, check_labels, check_positive


def sequence_logps(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of each row's labels, and the number of labels summed.

    Args:
        logits: ``[B, T, V]``, any floating dtype and strides, as a Hugging Face model returns them.
        labels: ``[B, T]`` integers *beside their inputs*, as Hugging Face models take them: the logits at position t
            are those of ``labels[:, t + 1]``; the shift happens here. ``labels[:, 0]`` has no logits and is never
            counted.
        ignore_index: the label of positions that do not count (prompt, padding).
        in_place: the backward pass writes the gradient over the logits' memory, so that nothing of their size is made.
            What else has saved the logits for its own backward pass then raises.

    Returns:
        ``(sums [B], counts [B])``: sums are fp64 for fp64 logits, else fp32; counts are int64. A row without a label
        has the sum 0, and a gradient of 0. Differentiable once with respect to the logits.

    Raises:
        TypeError: logits that are not floating or labels that are not integers.
        ValueError: shapes or devices that do not fit; on the CPU, a label outside ``[0, V)`` that is not
            ``ignore_index`` (other devices assert it, and nothing waits for them); ``in_place`` with logits that are a
            leaf of the graph or overlap in memory.
    """
    check_floating("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits has the shape {list(logits.shape)}: expected [B, T, V]")
    check_labels(labels, "logits", logits)
    labels = labels.to(torch.int64)
    logps, _ = ops.token_logps(logits, labels, ignore_index=ignore_index, in_place=in_place)
    return _sum(logps), _count(labels, ignore_index)


def _sum(logps: Tensor) -> Tensor:
    return logps.sum(1, dtype=torch.float64).to(logps.dtype)


def _count(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels[:, 1:] != ignore_index).sum(1)


def linear_sequence_logps(
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
) -> tuple[Tensor, Tensor]:
    """As :func:`sequence_logps`, from the last hidden states and the output embedding, without ``[tokens, V]`` logits.

    ``logits = cap((hidden @ weight.T + bias) * scale)`` with ``cap(x) = softcap * tanh(x / softcap)``, in this order:
    ``scale`` is Cohere's ``logit_scale`` or 1 / Granite's ``logits_scaling``, ``softcap`` Gemma 2's
    ``final_logit_softcapping``.

    Args:
        hidden: ``[B, T, H]``, what the model's head is given.
        weight: ``[V, H]``, of the same dtype (any two dtypes under ``torch.autocast``, whose dtype they are then
            rounded to). A weight sharded by FSDP2 (DTensor) is gathered once, and its gradient averaged over the ranks.
        labels: ``[B, T]``, as in :func:`sequence_logps`.
        bias: ``[V]``, of the weight's dtype.
        softcap: above 0, or ``None``.
        scale: above 0.
        chunk_bytes: what the logits held at once may take. By default 256 MiB, or a 64th of the device's memory where
            that is less. Where they all fit, the backward pass need not compute any again.
        ignore_index: the label of positions that do not count. Nothing is computed for them.
        group: a process group over whose ranks, in their order, the rows of ``weight`` (and ``bias``) are divided: the
            vocabulary-parallel head of tensor parallelism. ``hidden`` and ``labels``, which hold ids of the whole
            vocabulary, are the same on every rank, and so are the results and the gradient of ``hidden``.

    Returns:
        ``(sums [B], counts [B])`` as :func:`sequence_logps`. 16-bit factors are multiplied into fp32 logits on CUDA; on
        CPUs without instructions for them they are multiplied as fp32; elsewhere into logits of their dtype, as the
        model's head would. Gradients of weight and bias are summed in fp32 and rounded once to their dtype; they are
        left out where autograd does not want them (a frozen head; ``torch.autograd.grad`` with other inputs, as in a
        selective ascent). Differentiable once.

    Raises:
        TypeError, ValueError: as :func:`sequence_logps`; also for dtypes that differ outside autocast.
    """
    logps, _ = _from_hidden(
        hidden, weight, labels, bias, softcap, scale, chunk_bytes, ignore_index, group=group, shift=1, statistics=False
    )
    return _sum(logps), _count(labels, ignore_index)


class TokenLogps(NamedTuple):
    """Numbers of each token ``[B, T]``, beside its logits; 0 (``False``) where a token does not count.

    ``logps`` can be differentiated. The others cannot, and are ``None`` where they were not asked for: the entropy in
    nats, the mean of the logits over the vocabulary, and whether the label is the most likely token (of several, the
    first).
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
    shift: int = 1,
    statistics: bool = False,
) -> TokenLogps:
    """As :func:`linear_sequence_logps`, of each token; with ``statistics`` also what trainers log of its distribution.

    Args:
        shift: 1 where labels lie beside their inputs, 0 where they lie beside the hidden states that predict them.
    """
    logps, facts = _from_hidden(
        hidden,
        weight,
        labels,
        bias,
        softcap,
        scale,
        chunk_bytes,
        ignore_index,
        group=None,
        shift=shift,
        statistics=statistics,
    )
    return TokenLogps(logps, facts[0], facts[1], facts[2].bool()) if statistics else TokenLogps(logps)


def _from_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    chunk_bytes: int | None,
    ignore_index: int,
    *,
    group: Any,
    shift: int,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    weight, bias = _gather(weight), None if bias is None else _gather(bias)
    _check_head(hidden, weight, bias)
    check_labels(labels, "hidden", hidden)
    if softcap is not None:
        check_positive("softcap", softcap)
    check_positive("scale", scale)
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes is {chunk_bytes!r}: expected a number of bytes, at least 1, or None")
    if shift not in (0, 1):
        raise ValueError(f"shift is {shift!r}: expected 0 or 1")
    recording = torch.is_grad_enabled()
    logps, facts, *_ = linear_head.linear_token_logps(
        hidden,
        # A view, because the engine can be asked about its node and not about a leaf: see linear_head._is_wanted.
        weight.view_as(weight),
        bias,
        labels,
        ignore_index,
        shift,
        _compute_dtype(hidden, weight),
        float(scale),
        None if softcap is None else float(softcap),
        chunk_bytes,
        None if group is None else group.group_name,
        statistics,
        recording and hidden.requires_grad,
        recording and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        torch.compiler.is_compiling(),
    )
    return logps, facts


def _gather(tensor: Tensor) -> Tensor:
    """A DTensor in full, its gradient averaged over the ranks as FSDP2 does."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if hidden.dim() != 3:
        raise ValueError(f"hidden has the shape {list(hidden.shape)}: expected [B, T, H]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(f"weight has the shape {list(weight.shape)}: expected [V, {hidden.shape[2]}]")
    check_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"bias is {list(bias.shape)} {bias.dtype}: expected {list(weight.shape[:1])} {weight.dtype}"
            )
        check_device("bias", bias, "hidden", hidden)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that the head's inputs have, or are rounded to under autocast (which leaves fp64 alone)."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: expected one dtype (or torch.autocast)")
    return hidden.dtype
