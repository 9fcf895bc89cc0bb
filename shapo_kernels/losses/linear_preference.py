r"""A loss from hidden states and the head's weight with three products of matrices, whatever the number of tokens.

:func:`linear_sequence_logps` learns the gradient that reaches a log-probability in the backward pass only, when the
tiles of logits are gone, and computes them again: four products. But in a loss of pairs (DPO, IPO, SimPO, ...) what
reaches a response depends on its own pair alone. So the prompts are walked in turn, as many at once as fit into
`chunk_bytes`: their log-probabilities, their share of the loss, its gradient, and with that, while the logits are still
there, both products of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..interop.torch_private import group_of_name
from ..model.graph import edges, reached
from ..ops import linear_tiles as tiling
from ..ops._checks import check_first_order, check_floating, check_whole
from ..ops.linear_head import linear_token_logps as _token_logps
from ..ops.linear_head import put_weight_gradient_
from ..ops.linear_logps import describe, gathered
from ..ops.linear_tiles import HeadOptions
from .logps import linear_sequence_logps

Share = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    share: Share,
    *,
    responses: int = 2,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
    ignore_index: int = -100,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `share` over the prompts of a batch, its gradients computed in the forward pass.

    For updates that train the head. Where it is frozen, and in a selective ascent, :func:`linear_sequence_logps` makes
    two products instead of these three.

    Args:
        hidden: `[responses * B, T, H]`: the first response to each of B prompts (the chosen ones), then the second
            (the rejected ones).
        labels: `[responses * B, T]`, as for :func:`linear_sequence_logps`.
        weight, bias, softcap, scale, ignore_index, group: as for :func:`linear_sequence_logps`.
        share: `share(sums, counts, prompts)` returns what some prompts add to the batch's loss, a scalar. `prompts [n]`
            are their int64 indices below B, `sums` and `counts` are `[responses * n]` in the order of `hidden`. It is
            called once for each part of the batch. A mean divides by B, not by n. Its gradient flows to `sums` alone;
            what else it is made of, a learned beta for instance, must not take one. A loss that couples all pairs, as
            Dr.DPO does, takes `whole=`.
        responses: of a prompt. 2 for pairs, 1 for a likelihood.
        chunk_bytes: as for :func:`linear_sequence_logps`. If one prompt's logits do not fit, they are computed twice.

    In a graph of `torch.compile` it is :func:`linear_sequence_logps` and one call of `share`, with four products where
    the logits do not fit into `chunk_bytes`: a graph holds no function that asks for parts of unknown number.

    Returns:
        `(loss, sums, counts)`: the loss, differentiable once in `hidden`, `weight` and `bias`; `sums` and `counts` of
        all rows, without a gradient. A 16-bit weight's gradient is summed in float32, which is kept until the backward
        pass, and rounded once.

    Raises:
        TypeError, ValueError: as :func:`linear_sequence_logps`; a number of rows that `responses` does not divide; a
            share that is no scalar, or that depends on another tensor that takes a gradient (not seen in a graph of
            `torch.compile`, where that one gets it).
        RuntimeError: in a second backward pass through the same loss.
    """
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    head = describe(hidden, weight, labels, bias, softcap, scale, chunk_bytes, ignore_index, group)
    check_whole("responses", responses, least=1)
    if len(hidden) % responses:
        raise ValueError(f"hidden has {len(hidden)} rows and responses is {responses}: expected a multiple of it")
    if torch.compiler.is_compiling():
        return _in_a_graph(hidden, weight, labels, share, responses, bias, head, group)
    loss, sums, counts = _Loss.apply(hidden, weight, bias, labels, share, responses, head, torch.is_grad_enabled())
    return loss, sums, counts


def _in_a_graph(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    share: Share,
    responses: int,
    bias: Tensor | None,
    head: HeadOptions,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same loss as torch.compile traces it: `share` of all prompts at once, part of the graph with what it holds.

    An operator cannot take a function, and how many parts there are is known from the labels' values only.
    """
    sums, counts = linear_sequence_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        softcap=head.softcap,
        scale=head.scale,
        chunk_bytes=head.chunk_bytes,
        ignore_index=head.ignore_index,
        group=group,
    )
    value = share(sums, counts, torch.arange(len(hidden) // responses, device=hidden.device))
    _check_scalar(value)
    return value.to(sums.dtype), sums.detach(), counts


def _check_scalar(value: Tensor) -> None:
    if value.dim():
        raise ValueError(f"share returned the shape {list(value.shape)}: expected a scalar")


def _check_of_sums_alone(value: Tensor, sums: Tensor) -> None:
    leaves = [node.variable for node in reached(edges([value])) if hasattr(node, "variable")]
    if value.is_leaf or any(leaf is not sums for leaf in leaves):
        raise ValueError(
            "share depends on a tensor beside sums that takes a gradient, which would get none: detach it, or use "
            "linear_sequence_logps"
        )


def saves_a_product(
    tokens: Sequence[int], weight: Tensor, *, dtype: torch.dtype | None = None, chunk_bytes: int | None = None
) -> bool:
    """Whether :func:`linear_preference_loss` computes less than :func:`linear_sequence_logps` for a trained head.

    Logits that fit into one tile are kept by both, and then walking parts of the batch only costs more: the weight is
    read for each. A prompt whose own logits do not fit has them computed twice by both.

    Args:
        tokens: labelled tokens of each prompt, all its responses together.
        weight: `[V, H]`.
        dtype: that the head is computed in, the weight's by default.
        chunk_bytes: as for :func:`linear_sequence_logps`.

    Raises:
        TypeError, ValueError: numbers of tokens that are no whole numbers of 0 or more, and other arguments as they are
            refused there.
    """
    check_floating("weight", weight)
    for number in tokens:
        check_whole("tokens", number, least=0)
    if chunk_bytes is not None:
        check_whole("chunk_bytes", chunk_bytes, least=1)
    fits = tiling.room(weight.device, dtype or weight.dtype, chunk_bytes) // max(1, len(weight))
    return max(tokens, default=0) <= fits < sum(tokens)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        share: Share,
        responses: int,
        head: HeadOptions,
        recording: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = (recording and wanted for wanted in ctx.needs_input_grad[:3])
        counts = (labels[:, head.shift :] != head.ignore_index).sum(1)
        _, _, sum_dtype = tiling.dtypes(weight.device, head.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        sums = torch.zeros(len(hidden), dtype=sum_dtype, device=hidden.device)
        group = None if head.group is None else group_of_name(head.group)
        room = _room(weight, head, group)
        tokens = counts.view(responses, len(hidden) // responses).sum(0).tolist()
        parts = list(_parts(tokens, room))
        # What is added to once needs no more digits than it has. The scale of a GradScaler comes in the backward pass,
        # so float16 could neither hold these gradients, which are without it, nor the scale.
        once = sum(tokens) <= room and weight.dtype != torch.float16
        dtype = weight.dtype if once else torch.promote_types(weight.dtype, sum_dtype)
        to_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        to_bias = torch.zeros_like(weight[:, 0], dtype=sum_dtype) if wants_bias else None
        by_hidden = sum_dtype if hidden.dtype == torch.float16 else hidden.dtype
        to_hidden = hidden.new_empty(hidden.shape, dtype=by_hidden) if wants_hidden else None
        differentiable: list[bool] = []
        first_rows = torch.arange(responses, device=hidden.device)[:, None] * (len(hidden) // responses)

        def walk(part: slice) -> None:
            """A function, so that a part's logits are gone before the next one's are made."""
            prompts = torch.arange(part.start, part.stop, device=hidden.device)
            rows = (first_rows + prompts).view(-1)
            inputs = hidden.detach()[rows], weight.detach(), None if bias is None else bias.detach(), labels[rows]
            logps, _, index, per_token, directions, slopes, plan = _token_logps(
                *inputs, *head, wants_hidden, wants_weight or wants_bias
            )
            found = logps.sum(1, dtype=torch.float64).to(sum_dtype)
            sums[rows] = found
            with torch.set_grad_enabled(recording):
                value = share(found.requires_grad_(recording), counts[rows], prompts)
            _check_scalar(value)
            loss.add_(value.detach())
            if value.requires_grad:
                _check_of_sums_alone(value, found)
                differentiable.append(True)
            else:
                if to_hidden is not None:
                    to_hidden[rows] = 0
                return
            (upstream,) = torch.autograd.grad(value, found, materialize_grads=True)
            g = upstream.to(sum_dtype)[index // max(1, hidden.shape[1])]
            if to_hidden is not None:
                own = to_hidden.new_zeros((len(rows) * hidden.shape[1], hidden.shape[2]))
                by_row = directions * g[:, None]
                if group is not None:
                    dist.all_reduce(by_row, group=group)
                own[index] = by_row.to(own.dtype)
                to_hidden[rows] = own.view(len(rows), *hidden.shape[1:])
            put_weight_gradient_((to_weight, to_bias), g, inputs, index, per_token, slopes, plan, head, add=True)

        for part in parts:
            walk(part)
        ctx.grads = to_hidden, to_weight, to_bias
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        loss = loss.to(sum_dtype)
        # A share that lost its graph raises in the user's backward pass, as it does without this function.
        ctx.mark_non_differentiable(sums, counts, *(() if differentiable else (loss,)))
        return loss, sums, counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        check_first_order("linear_preference_loss", "use linear_sequence_logps")
        if ctx.grads is None:
            raise RuntimeError("linear_preference_loss: a second backward pass; its gradients are handed out once")
        to_hidden, to_weight, to_bias = ctx.grads
        ctx.grads = None
        scaled = (None if each is None else each.mul_(grad.to(each.dtype)) for each in (to_hidden, to_weight, to_bias))
        grads = (None if each is None else each.to(d) for each, d in zip(scaled, ctx.dtypes, strict=True))
        return *grads, None, None, None, None, None


def _room(weight: Tensor, head: HeadOptions, group: Any) -> int:
    """Labelled tokens whose logits fit into `chunk_bytes`, on every rank that has a part of the vocabulary."""
    room = tiling.limit(weight, head) // max(1, len(weight))
    if group is None:
        return room
    fewest = torch.tensor(room, device=weight.device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN, group=group)
    return int(fewest)


def _parts(tokens: list[int], room: int) -> Iterator[slice]:
    """Neighbouring prompts whose labelled tokens are at most `room` together, at least one."""
    start = held = 0
    for prompt, count in enumerate(tokens):
        if held and held + count > room:
            yield slice(start, prompt)
            start, held = prompt, 0
        held += count
    yield slice(start, len(tokens))
