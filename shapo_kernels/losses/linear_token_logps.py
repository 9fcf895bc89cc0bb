"""The computation under ``linear_sequence_logps``: log-probabilities from hidden states and the head's weight.

Arguments are taken as checked. ``targets [B, T]`` holds for each position the label it predicts, or ``ignore_index``;
results are ``[B, T]`` with 0 at ignored positions, fp64 for fp64 inputs, else fp32. The labelled tokens alone are
worked on, a chunk of them at a time.

The loss's gradient reaches a token as one number g that is known in the backward pass only, but it enters last:

    d loss / d hidden_t = g_t (slope_t @ weight),     d loss / d weight = slope^T @ (g * hidden),

with ``slope [n, V]`` the gradient of the log-probabilities with respect to the logits. So the forward pass goes on to
``slope @ weight`` while it has the chunk's logits, and a frozen head, or a selective ascent, costs the two products of
the plain head. Where the weight's gradient is asked for, the backward pass computes the logits again: four products
instead of three; or none again, where a single chunk holds every token and its slope is kept.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..ops._checks import check_first_order
from ._checks import result_dtype

# Of a chunk's logits: far below those of a batch, and enough tokens that the products do not wait for the weight.
CHUNK_BYTES = 256 << 20
SMALLEST_CHUNK_BYTES = 16 << 20
# The share of a device's memory that a chunk may take.
MEMORY_SHARE = 64
# Elements of a 16-bit product that are added to an fp32 sum at once: 8 MiB.
BLOCK_ELEMENTS = 1 << 22


class Head(NamedTuple):
    """How hidden states become logits: ``cap((hidden @ weight.T + bias) * scale)``, of inputs in ``compute_dtype``.

    Over the ranks of ``group`` each holds the rows ``[first, first + len(weight))`` of a weight of ``vocabulary`` rows.
    """

    compute_dtype: torch.dtype
    scale: float
    softcap: float | None
    chunk_size: int | None
    vocabulary: int
    first: int = 0
    group: Any = None


def linear_token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, head: Head
) -> Tensor:
    """Log-probability of each target under the logits that ``hidden [B, T, H]`` and ``weight [V, H]`` give."""
    # A view, because the engine can be asked about its node and not about a leaf: see _is_wanted.
    weight = weight.view_as(weight)
    return _LinearTokenLogps.apply(hidden, weight, bias, targets, ignore_index, head, torch.is_grad_enabled())


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        head: Head,
        grad_enabled: bool,
    ) -> Tensor:
        dtype, width = result_dtype(hidden), hidden.shape[2]
        rows = (targets != ignore_index).nonzero()
        size = head.chunk_size or _chunk_tokens(len(rows), hidden.device, head)
        wants_hidden, wants_head = (
            grad_enabled and ctx.needs_input_grad[0],
            grad_enabled and any(ctx.needs_input_grad[1:3]),
        )
        keeps = wants_head and len(rows) <= size
        per_token = torch.empty((3, len(rows)), dtype=dtype, device=hidden.device)
        grad_hidden = hidden.new_empty((len(rows) if wants_hidden and not keeps else 0, width), dtype=dtype)
        slope = None
        with torch.autocast(hidden.device.type, enabled=False):
            rounded = weight.to(head.compute_dtype)
            buffer = _logits_buffer(min(size, len(rows)), rounded)
            for part, where in _chunks(rows, size):
                logits = _project(hidden[where], rounded, bias, head, buffer)
                _normalize(logits, targets[where], head, per_token[:, part])
                if keeps or wants_hidden:
                    slope = _slope_(logits, targets[where], head, per_token[:, part])
                    if not keeps:
                        grad_hidden[part] = _multiply(slope, rounded, dtype)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, per_token, grad_hidden, slope if keeps else None)
        ctx.head, ctx.size, ctx.weight_node = head, size, weight.grad_fn
        logps = torch.zeros(targets.shape, dtype=dtype, device=hidden.device)
        logps[rows[:, 0], rows[:, 1]] = per_token[0]
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("linear_sequence_logps", "use a linear layer and torch.log_softmax")
        hidden, weight, bias, targets, rows, per_token, grad_rows, slope = ctx.saved_tensors
        head = ctx.head
        grad = grads[0][rows[:, 0], rows[:, 1]]
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            rounded = weight.to(head.compute_dtype)
            if ctx.needs_input_grad[0]:
                grad_hidden = torch.zeros_like(hidden)
                by_row = grad_rows if slope is None else _multiply(slope, rounded, grad.dtype)
                by_row = _sum_over_ranks(by_row * grad[:, None], head)
                grad_hidden[rows[:, 0], rows[:, 1]] = by_row.to(hidden.dtype)
            wants_weight = ctx.needs_input_grad[1] and _is_wanted(ctx.weight_node)
            # Sums over all chunks, so not in the head's 16 bits; one chunk is no sum.
            dtype = grad.dtype if len(rows) > ctx.size else head.compute_dtype
            if wants_weight or ctx.needs_input_grad[2]:
                buffer = _logits_buffer(min(ctx.size, len(rows)) if slope is None else 0, rounded)
                for part, where in _chunks(rows, ctx.size):
                    of_part = slope
                    if of_part is None:
                        logits = _project(hidden[where], rounded, bias, head, buffer)
                        of_part = _slope_(logits, targets[where], head, per_token[:, part])
                    if wants_weight:
                        inputs = (hidden[where].to(grad.dtype) * grad[part, None]).to(head.compute_dtype)
                        grad_weight = _add_product(grad_weight, of_part.t(), inputs, dtype)
                    if ctx.needs_input_grad[2]:
                        column = grad[part, None].to(head.compute_dtype)
                        grad_bias = _add_product(grad_bias, of_part.t(), column, grad.dtype)
            if not len(rows):
                grad_weight = torch.zeros_like(weight) if wants_weight else None
                grad_bias = torch.zeros_like(bias)[:, None] if ctx.needs_input_grad[2] else None
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias[:, 0].to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _chunk_tokens(tokens: int, device: torch.device, head: Head) -> int:
    """Tokens in a chunk: what its bytes allow, and no chunk much smaller than the others."""
    ranks = 1 if head.group is None else dist.get_world_size(head.group)
    element = 8 if head.compute_dtype == torch.float64 else 4
    most = max(1, chunk_bytes(device) * ranks // max(1, head.vocabulary * element))
    return max(1, -(-tokens // max(1, -(-tokens // most))))


@functools.cache
def chunk_bytes(device: torch.device) -> int:
    """What a chunk's logits may take: a share of the device's memory (of all of it: what is free would vary)."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = CHUNK_BYTES * MEMORY_SHARE
    return max(SMALLEST_CHUNK_BYTES, min(CHUNK_BYTES, memory // MEMORY_SHARE))


def _chunks(rows: Tensor, size: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part, (rows[part, 0], rows[part, 1])


def _logits_buffer(tokens: int, weight: Tensor) -> Tensor:
    """For a chunk's logits: in fp32 where the device multiplies 16-bit factors into that, else as the head has them."""
    dtype = torch.float32 if _multiplies_wide(weight) else weight.dtype
    return torch.empty((tokens, len(weight)), dtype=dtype, device=weight.device)


def _multiplies_wide(factor: Tensor) -> bool:
    return factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None, head: Head, buffer: Tensor) -> Tensor:
    """The logits ``[n, V]`` of ``inputs [n, H]``, in the first rows of ``buffer``."""
    logits, inputs = buffer[: len(inputs)], inputs.to(weight.dtype)
    if logits.dtype == weight.dtype:
        torch.mm(inputs, weight.t(), out=logits)
    else:
        torch.mm(inputs, weight.t(), out_dtype=logits.dtype, out=logits)
    if bias is not None:
        logits.add_(bias.to(weight.dtype))
    if head.scale != 1:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _normalize(logits: Tensor, targets: Tensor, head: Head, per_token: Tensor) -> None:
    """Writes log-probability, maximum and sum of exponentials of each token to ``per_token [3, n]``."""
    logps, normalizers, _ = backends.function(logits.device, "token_logps")(
        logits[None], targets[None], _NOTHING, 0, head.first, head.vocabulary, False
    )
    if head.group is not None:
        logps, normalizers = _join(
            logps, normalizers, (targets >= head.first) & (targets < head.first + logits.shape[1]), head
        )
    per_token[0], per_token[1:] = logps[0], normalizers[:, 0]


# No target is ignored any more, and none is negative.
_NOTHING = -1


def _join(logps: Tensor, normalizers: Tensor, held: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The same over all ranks: the maximum, the sums scaled to it, the label's logit from the rank that has it."""
    highest, total = normalizers.double()
    overall = highest.clone()
    dist.all_reduce(overall, dist.ReduceOp.MAX, group=head.group)
    rise = torch.where(highest == overall, 0.0, highest - overall)
    label = torch.where(held, logps.double() + total.log() + rise, 0.0)
    sums = torch.stack([total * rise.exp(), label])
    dist.all_reduce(sums, group=head.group)
    return (sums[1] - sums[0].log()).to(logps.dtype), torch.stack([overall, sums[0]]).to(logps.dtype)


def _slope_(logits: Tensor, targets: Tensor, head: Head, per_token: Tensor) -> Tensor:
    """The gradient ``[n, V]`` of each token's log-probability with respect to ``hidden @ weight.T + bias``.

    In the compute dtype, over the memory of the logits where that is theirs.
    """
    # d cap(x) / dx = 1 - tanh(x / softcap)^2
    bend = None if head.softcap is None else logits.div(head.softcap).square_().neg_().add_(1)
    logps, normalizers = per_token[:1].contiguous(), per_token[1:, None].contiguous()
    backends.function(logits.device, "token_logps_gradient_")(
        logits[None], targets[None], logps, normalizers, torch.full_like(logps, head.scale), _NOTHING, 0, head.first
    )
    if bend is not None:
        logits.mul_(bend)
    return logits.to(head.compute_dtype)


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``: with 16-bit factors rounded on the way only where the device cannot do otherwise."""
    if a.dtype != dtype and _multiplies_wide(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` in ``dtype``, over the memory of ``total``."""
    if total is None:
        if a.dtype == dtype:
            return a @ b
        total = torch.zeros((len(a), b.shape[1]), dtype=dtype, device=a.device)
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    step = max(1, BLOCK_ELEMENTS // max(1, b.shape[1]))
    for start in range(0, len(a), step):
        total[start : start + step] += _multiply(a[start : start + step], b, dtype)
    return total


def _sum_over_ranks(tensor: Tensor, head: Head) -> Tensor:
    if head.group is not None:
        dist.all_reduce(tensor, group=head.group)
    return tensor


def _is_wanted(node: torch.autograd.graph.Node | None) -> bool:
    """Whether the running backward pass goes on to ``node``.

    ``needs_input_grad`` says only that an input requires a gradient, so ``autograd.grad(loss, others)`` would have the
    largest product of the backward pass done for nothing: a selective ascent never asks for the head's gradient.
    """
    # What torch.autograd.graph.register_multi_grad_hook asks; where a later torch lacks it, the gradient is computed.
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    return node is None or ask is None or bool(ask(node))
