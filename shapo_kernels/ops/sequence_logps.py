r"""Log-probabilities of labels under a softmax over a vocabulary, each pass over the logits made once.

.. math:: \log p_t = x_{t, y_t} - m_t - \log S_t, \qquad m_t = \max_v x_{tv}, \quad S_t = \sum_v e^{x_{tv} - m_t},
          \qquad \frac{\partial \log p_t}{\partial x_{tv}} = [v = y_t] - \frac{e^{x_{tv} - m_t}}{S_t}

Kept for the backward pass are, beside the logits, the numbers :math:`\log p_t, m_t, S_t` of each token. The maximum and
the sum are kept apart, because their log-sum-exp would be rounded at the size of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from ._checks import check_first_order, check_floating, check_same_device
from .subspace_update import compute_dtype_of


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: int = 1,
    entropy: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token's label; with ``entropy`` also each token's entropy.

    Args:
        logits: ``[B, T, V]`` in float32, bfloat16, float16 or float64, any strides.
        labels: int64 ``[B, T]``; position t of the result belongs to ``labels[:, t + shift]``.
        ignore_index: the label of tokens that do not count; their logits are not read.
        shift: 1 where labels lie beside their inputs, 0 where they lie beside the logits that predict them.
        entropy: also return the entropy in nats of each counted token's softmax. It is not differentiable.
        in_place: the backward pass writes the gradient over the logits' memory. The logits are lost by then: whatever
            else has saved them for its own backward pass raises.

    Returns:
        ``[B, T]`` each (the second ``None`` without ``entropy``), float64 for float64 logits, else float32; 0 where a
        token does not count. Differentiable once with respect to the logits.

    Raises:
        ValueError: on the CPU, for a label outside ``[0, V)`` that is not ``ignore_index``; elsewhere the device
            asserts it and nothing waits for the device. Also for ``in_place`` with logits that are a leaf of the graph
            or overlap in memory.
    """
    check_floating("logits", [logits])
    check_same_device("logits", [logits, labels])
    if logits.dim() != 3 or labels.dtype != torch.int64 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits has shape {list(logits.shape)} and labels is {labels.dtype} {list(labels.shape)}: "
            "expected [B, T, V] and torch.int64 [B, T]"
        )
    check_labels(labels, ignore_index, logits.shape[2])
    if in_place and torch.is_grad_enabled() and logits.requires_grad:
        _check_overwritable(logits)
    logps, entropies = _TokenLogps.apply(logits, labels, ignore_index, shift, entropy, in_place)
    return logps, entropies if entropy else None


def check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Each label is ``ignore_index`` or in ``[0, vocabulary)``: raises on the CPU, else the device asserts it."""
    allowed = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    expected = f"expected {ignore_index} (ignored) or a token in [0, {vocabulary})"
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(allowed.all(), f"labels contains another value than {expected}")
    elif not allowed.all():
        raise ValueError(f"labels contains {labels[~allowed][0].item()}: {expected}")


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError("logits is a leaf of the graph, which in_place would overwrite: use in_place=False")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
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


def fake_token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: int, first: int, vocabulary: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, _ = logits.shape
    dtype = compute_dtype_of(logits.dtype)
    return (
        logits.new_empty(rows, length, dtype=dtype),
        logits.new_empty(2, rows, length, dtype=dtype),
        logits.new_empty(rows if entropy else 0, length, dtype=dtype),
    )


def fake_token_logps_gradient(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def fake_token_logps_gradient_(logits: Tensor, *_: Any) -> None:
    return None


if native.has_cpu or native.has_cuda:
    torch.library.register_fake("shapo_kernels::token_logps", fake_token_logps)
    torch.library.register_fake("shapo_kernels::token_logps_gradient", fake_token_logps_gradient)
    torch.library.register_fake("shapo_kernels::token_logps_gradient_", fake_token_logps_gradient_)
