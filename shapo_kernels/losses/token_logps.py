"""The computation under ``logps``: log-probabilities of single tokens, with a backward pass that keeps no logits.

For logits x of a token and its label y:  log p = x_y - log sum_v exp(x_v),   d log p / dx_v = [v = y] - exp(x_v) / sum.

Arguments are taken as checked. ``targets [B, T]`` holds for each position the label it predicts, or ``ignore_index``;
results are ``[B, T]`` with 0 at ignored positions, fp64 for fp64 inputs, else fp32. Work goes over the labelled tokens
in chunks, in three steps that a fused kernel may replace one by one: ``_project`` (logits), ``_pick_`` (forward) and
``_slope_`` (backward).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._checks import check_first_order
from ._checks import result_dtype

# 64 MiB in fp32: large enough to keep a GPU busy, small beside the logits of a batch.
CHUNK_ELEMENTS = 1 << 24
# Fewer rows than this make the head's matrix products wait for memory: every chunk reads the whole weight.
MIN_CHUNK_TOKENS = 512
# Elements of a 16-bit weight that are widened at once: 16 MiB in fp32.
WIDENED_ELEMENTS = 1 << 22


def _labelled(targets: Tensor, ignore_index: int) -> Tensor:
    """``[N, 2]``: row and position of each target that counts."""
    return (targets != ignore_index).nonzero()


def _chunks(rows: Tensor, size: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part, (rows[part, 0], rows[part, 1])


def _pick_(logits: Tensor, labels: Tensor, normalizers: Tensor) -> Tensor:
    """Log-probability of each row's label; writes the two parts of log-sum-exp to ``normalizers [2, n]``.

    The parts (maximum, log of the shifted sum) are kept apart because their sum would be rounded at the size of the
    logits, where the parts are subtracted one after the other at the size of the result. Overwrites ``logits [n, V]``.
    """
    picked = logits.gather(1, labels[:, None])[:, 0]
    highest, log_sum = normalizers
    torch.amax(logits, 1, out=highest)
    torch.log(logits.sub_(highest[:, None]).exp_().sum(1), out=log_sum)
    return picked - highest - log_sum


def _slope_(logits: Tensor, labels: Tensor, normalizers: Tensor, grad: Tensor) -> Tensor:
    """Overwrites ``logits [n, V]`` with the gradient of ``sum(grad * log p)`` and returns it."""
    highest, log_sum = normalizers[:, :, None]
    logps = logits.sub_(highest).sub_(log_sum)
    # 1 - p without cancellation where p is close to 1.
    at_label = logps.gather(1, labels[:, None]).expm1_().neg_().mul_(grad[:, None])
    return logps.exp_().mul_(-grad[:, None]).scatter_(1, labels[:, None], at_label)


class Head(NamedTuple):
    """How hidden states become logits: ``cap((hidden @ weight.T + bias) * scale)``, of inputs in ``compute_dtype``."""

    compute_dtype: torch.dtype
    scale: float
    softcap: float | None
    chunk_size: int | None


def linear_token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, head: Head
) -> Tensor:
    """Log-probability of each target under the logits that ``hidden [B, T, H]`` and ``weight [V, H]`` give."""
    # A view, because the engine can be asked about its node and not about a leaf: see _is_wanted.
    return _LinearTokenLogps.apply(hidden, weight.view_as(weight), bias, targets, ignore_index, head)


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, head: Head
    ) -> Tensor:
        dtype = result_dtype(hidden)
        rows = _labelled(targets, ignore_index)
        size = head.chunk_size or _chunk_tokens(len(rows), *weight.shape)
        logps = torch.zeros(targets.shape, dtype=dtype, device=hidden.device)
        normalizers = torch.empty((2, len(rows)), dtype=dtype, device=hidden.device)
        buffer = torch.empty((min(size, len(rows)), len(weight)), dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, where in _chunks(rows, size):
                logits = _project(_widen(hidden[where], head, dtype), weight, bias, head, buffer)
                logps[where] = _pick_(logits, targets[where], normalizers[:, part])
        ctx.save_for_backward(hidden, weight, bias, targets, rows, normalizers)
        ctx.head, ctx.size, ctx.weight_node = head, size, weight.grad_fn
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("linear_sequence_logps", "use a linear layer and torch.log_softmax")
        hidden, weight, bias, targets, rows, normalizers = ctx.saved_tensors
        head, dtype = ctx.head, grad.dtype
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # Sums over all chunks, so not in the weight's 16 bits; the same tensor is returned where the dtypes agree.
        wants_weight = ctx.needs_input_grad[1] and _is_wanted(ctx.weight_node)
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if ctx.needs_input_grad[2] else None
        buffer = torch.empty((min(ctx.size, len(rows)), len(weight)), dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, where in _chunks(rows, ctx.size):
                inputs = _widen(hidden[where], head, dtype)
                logits = _project(inputs, weight, bias, head, buffer)
                # d cap(x) / dx = 1 - tanh(x / softcap)^2
                bend = None if head.softcap is None else logits.div(head.softcap).square_().neg_().add_(1)
                slope = _slope_(logits, targets[where], normalizers[:, part], grad[where] * head.scale)
                if bend is not None:
                    slope.mul_(bend)
                if grad_hidden is not None:
                    grad_hidden[where] = _project_back(slope, weight, head).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(slope.t(), inputs)
                if grad_bias is not None:
                    grad_bias.add_(slope.sum(0))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunk_tokens(tokens: int, vocabulary: int, width: int) -> int:
    """As many tokens as have logits no larger than the hidden states, within the documented bounds."""
    fair = max(MIN_CHUNK_TOKENS, tokens * width // max(1, vocabulary))
    return max(1, min(fair, -(-tokens // 4)))


def _widen(tensor: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Rounded to the compute dtype, held in the wide one: sums of 16-bit products are then fp32."""
    return tensor.to(head.compute_dtype).to(dtype)


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None, head: Head, buffer: Tensor) -> Tensor:
    """The logits ``[n, V]`` of ``inputs [n, H]``, in the first rows of ``buffer``."""
    logits = buffer[: len(inputs)]
    for block in _vocabulary_blocks(weight, buffer.dtype):
        torch.mm(inputs, _widen(weight[block], head, buffer.dtype).t(), out=logits[:, block])
    if bias is not None:
        logits.add_(_widen(bias, head, buffer.dtype))
    if head.scale != 1:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _project_back(slope: Tensor, weight: Tensor, head: Head) -> Tensor:
    """``slope [n, V] @ weight``, in the dtype of ``slope``."""
    result = torch.zeros((len(slope), weight.shape[1]), dtype=slope.dtype, device=slope.device)
    for block in _vocabulary_blocks(weight, slope.dtype):
        result.addmm_(slope[:, block], _widen(weight[block], head, slope.dtype))
    return result


def _vocabulary_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """The whole vocabulary at once, or blocks of it where a widened copy of the weight would have to be made."""
    rows = len(weight) if weight.dtype == dtype else max(1, WIDENED_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), max(1, rows)):
        yield slice(start, min(start + rows, len(weight)))


def _is_wanted(node: torch.autograd.graph.Node | None) -> bool:
    """Whether the running backward pass goes on to ``node``.

    ``needs_input_grad`` says only that an input requires a gradient, so ``autograd.grad(loss, others)`` would have the
    largest product of the backward pass done for nothing: a selective ascent never asks for the head's gradient.
    """
    # What torch.autograd.graph.register_multi_grad_hook asks; where a later torch lacks it, the gradient is computed.
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    return node is None or ask is None or bool(ask(node))
