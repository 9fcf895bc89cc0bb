r"""Log-probabilities of labels under a softmax over a vocabulary. Forward and backward each read the logits once.

.. math:: \log p_t = x_{t, y_t} - m_t - \log S_t, \qquad m_t = \max_v x_{tv}, \quad S_t = \sum_v e^{x_{tv} - m_t},
          \qquad \frac{\partial \log p_t}{\partial x_{tv}} = [v = y_t] - \frac{e^{x_{tv} - m_t}}{S_t}

The backward pass needs the logits and three numbers of each token, :math:`\log p_t, m_t, S_t`. The maximum and the sum
are kept apart, because their log-sum-exp would be rounded at the size of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..interop.torch_private import base_of
from ._checks import (
    check_device,
    check_first_order,
    check_floating,
    check_ignore_index,
    check_label_values,
    check_switches,
    check_tensor,
    check_whole,
    may_overlap,
)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: int = 1,
    entropy: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token's label; with `entropy` also each token's entropy.

    Args:
        logits: `[B, T, V]` in float32, bfloat16, float16 or float64, any strides.
        labels: int64 `[B, T]`; position t of the result belongs to `labels[:, t + shift]`.
        ignore_index: the label of tokens that do not count; their logits are not read.
        shift: 1 if labels lie beside their inputs, 0 if they lie beside the logits that predict them.
        entropy: also return the entropy in nats of each counted token's softmax. It is not differentiable.
        in_place: the backward pass writes the gradient over the logits' memory. Anything else that saved the logits for
            its own backward pass then raises.

    Returns:
        `[B, T]` each (the second `None` without `entropy`), float64 for float64 logits, else float32; 0 where a
        token does not count. Differentiable once with respect to the logits.

    Raises:
        TypeError: logits that are not floating point, labels that are not int64.
        ValueError: shapes or devices that do not fit, a negative `shift`; on the CPU, a label outside `[0, V)` that
            is not `ignore_index` (elsewhere the device asserts it, and nothing waits for the device); `in_place`
            with logits that are a leaf of the graph, a view of one, or overlap in memory.
    """
    check_floating("logits", logits)
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}: expected torch.int64")
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits has shape {list(logits.shape)} and labels {list(labels.shape)}: expected [B, T, V] and [B, T]"
        )
    check_device("labels", labels, "logits", logits)
    check_ignore_index(ignore_index)
    check_whole("shift", shift, least=0)
    check_switches(entropy=entropy, in_place=in_place)
    check_label_values(labels, ignore_index, logits.shape[2])
    if in_place and torch.is_grad_enabled() and logits.requires_grad:
        _check_overwritable(logits)
    shift = torch.sym_min(shift, labels.shape[1])  # beyond it nothing counts, and positions must not overflow
    logps, entropies = _TokenLogps.apply(logits, labels, ignore_index, shift, entropy, in_place)
    return logps, entropies if entropy else None


def _check_overwritable(logits: Tensor) -> None:
    # torch.compile writes to copies of its own, and cannot trace a look at what a view is based on.
    base = None if torch.compiler.is_compiling() else base_of(logits)
    if logits.is_leaf or (base is not None and base.is_leaf):
        raise ValueError(
            "logits is a leaf of the graph or a view of one (a parameter?), which in_place would overwrite: "
            "use in_place=False"
        )
    if may_overlap(logits):
        raise ValueError(f"logits has the strides {logits.stride()} and overlaps itself: use in_place=False")


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, shift: int, entropy: bool, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        logps, normalizers, entropies = backends.function(logits.device, "token_logps")(
            logits, labels, ignore_index, shift, 0, logits.shape[2], entropy
        )
        ctx.save_for_backward(logits, labels, logps, normalizers)
        ctx.mark_non_differentiable(entropies)
        ctx.ignore_index, ctx.shift, ctx.in_place = ignore_index, shift, in_place
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("token_logps", "use torch.log_softmax")
        logits, labels, logps, normalizers = ctx.saved_tensors
        arguments = labels, logps, normalizers, grads[0].contiguous(), ctx.ignore_index, ctx.shift, 0
        if ctx.in_place:
            slope = logits.detach()
            backends.function(logits.device, "token_logps_gradient_")(slope, *arguments)
            torch.autograd.graph.increment_version(slope)
        else:
            slope = backends.function(logits.device, "token_logps_gradient")(logits, *arguments)
        return slope, None, None, None, None, None
