"""Log-probabilities of responses under a causal language model: from logits, or from hidden states without the logits.

    log p = logit[label] - log sum exp(logit),   summed over a response's tokens

The two public functions check and sum; the mathematics is with ``ops.token_logps`` and ``linear_token_logps``, which do
the work. ``linear_sequence_logps`` never holds the logits of more than a chunk of tokens. Log-sum-exp is taken in
fp32 (fp64 for fp64 inputs), sums over tokens in fp64: bf16 sums over 256 tokens are off by 2 and more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from .. import ops
from ..ops.sequence_logps import check_labels as check_label_values
from ._checks import check_device, check_floating, check_labels, check_positive
from .linear_token_logps import Head, linear_token_logps


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


def _shift(labels: Tensor, ignore_index: int) -> Tensor:
    """``[B, T]``: at each position the label that its logits are to predict; nothing at the last one."""
    targets = torch.full_like(labels, ignore_index, dtype=torch.int64)
    targets[:, :-1] = labels[:, 1:]
    return targets


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
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
        chunk_size: tokens whose logits are held at once. By default as many as have 256 MiB of fp32 logits, or a 64th
            of the device's memory where that is less.
        ignore_index: the label of positions that do not count. Nothing is computed for them.
        group: a process group over whose ranks, in their order, the rows of ``weight`` (and ``bias``) are divided: the
            vocabulary-parallel head of tensor parallelism. ``hidden`` and ``labels``, which hold ids of the whole
            vocabulary, are the same on every rank, and so are the results and the gradient of ``hidden``.

    Returns:
        ``(sums [B], counts [B])`` as :func:`sequence_logps`. 16-bit factors are multiplied in their dtype, into fp32
        logits on CUDA, into logits of their dtype elsewhere, as the model's head would. Gradients of weight and bias
        are accumulated over chunks in fp32 and rounded once to their dtype; they are left out where autograd does not
        want them (a frozen head; ``torch.autograd.grad`` with other inputs, as in a selective ascent). Differentiable
        once.

    Raises:
        TypeError, ValueError: as :func:`sequence_logps`; also for dtypes that differ outside autocast.
    """
    weight, bias = _gather(weight), None if bias is None else _gather(bias)
    _check_head(hidden, weight, bias)
    first, vocabulary = _place(weight, group)
    check_labels(labels, "hidden", hidden)
    check_label_values(labels, ignore_index, vocabulary)
    if softcap is not None:
        check_positive("softcap", softcap)
    check_positive("scale", scale)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}: expected a number of tokens, at least 1, or None")
    targets = _shift(labels, ignore_index)
    head = Head(_compute_dtype(hidden, weight), scale, softcap, chunk_size, vocabulary, first, group)
    return _sum(linear_token_logps(hidden, weight, bias, targets, ignore_index, head)), _count(labels, ignore_index)


def _gather(tensor: Tensor) -> Tensor:
    """A DTensor in full, its gradient averaged over the ranks as FSDP2 does."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _place(weight: Tensor, group: Any) -> tuple[int, int]:
    """The first row of this rank's part of the weight, and the rows of all parts."""
    if group is None:
        return 0, weight.shape[0]
    own = torch.tensor([weight.shape[0]], device=weight.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    rows = torch.cat(parts).tolist()
    return sum(rows[: dist.get_rank(group)]), sum(rows)


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
