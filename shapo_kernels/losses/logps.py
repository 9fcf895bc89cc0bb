"""Log-probabilities of responses under a causal language model: from logits, or from hidden states without the logits.

    log p = logit[label] - log sum exp(logit),   summed over a response's tokens

The functions here sum over tokens, in float64: bfloat16 sums over 256 tokens are off by 2 and more. The log-sum-exp is
taken in float32 (float64 for float64 inputs), by `ops.token_logps` and `ops.linear_token_logps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops._checks import check_floating, check_labels


def sequence_logps(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of each row's labels, and the number of labels summed.

    Args:
        logits: `[B, T, V]`, any floating dtype and strides, as a Hugging Face model returns them.
        labels: `[B, T]` integers *beside their inputs*, as Hugging Face models take them: the logits at position t
            are those of `labels[:, t + 1]`. The shift happens here. `labels[:, 0]` has no logits and never counts.
        ignore_index: the label of positions that do not count (prompt, padding).
        in_place: the backward pass writes the gradient over the logits' memory, so that nothing of their size is made.
            Anything else that saved the logits for its own backward pass then raises.

    Returns:
        `(sums [B], counts [B])`: sums are float64 for float64 logits, else float32; counts are int64. A row without a
        label has the sum 0, and a gradient of 0. Differentiable once with respect to the logits.

    Raises:
        TypeError: logits that are not floating point or labels that are not integers.
        ValueError: shapes or devices that do not fit; on the CPU, a label outside `[0, V)` that is not
            `ignore_index` (other devices assert it, and nothing waits for them); `in_place` with logits that are a
            leaf of the graph, a view of one, or overlap in memory.
    """
    check_floating("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {list(logits.shape)}: expected [B, T, V]")
    check_labels(labels, "logits", logits)
    labels = labels.to(torch.int64)
    logps, _ = ops.token_logps(logits, labels, ignore_index=ignore_index, in_place=in_place)
    return _sum(logps), _count(labels, ignore_index)


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
    """As :func:`sequence_logps`, from the last hidden states and the output embedding, without `[tokens, V]` logits.

    Args:
        hidden, weight, bias, softcap, scale, chunk_bytes, group: as for :func:`linear_token_logps`.
        labels: `[B, T]`, as in :func:`sequence_logps`.
        ignore_index: the label of positions that do not count. Nothing is computed for them.

    Returns:
        `(sums [B], counts [B])` as :func:`sequence_logps`; gradients as :func:`linear_token_logps`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`linear_token_logps`.
    """
    found = ops.linear_token_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        softcap=softcap,
        scale=scale,
        chunk_bytes=chunk_bytes,
        ignore_index=ignore_index,
        group=group,
    )
    return _sum(found.logps), _count(labels, ignore_index)


def _sum(logps: Tensor) -> Tensor:
    return logps.sum(1, dtype=torch.float64).to(logps.dtype)


def _count(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels[:, 1:] != ignore_index).sum(1)
