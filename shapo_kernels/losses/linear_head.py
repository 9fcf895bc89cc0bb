r"""The computation under ``linear_sequence_logps``: log-probabilities from hidden states and the head's weight.

Two operators, forward and backward, opaque to ``torch.compile``; their arguments are taken as checked. The labelled
tokens alone are worked on, in tiles ``[tokens, part of the vocabulary]`` of logits ``x``. As attention does with its
keys and values, a walk over the vocabulary keeps for each token the log-sum-exp so far and the weight's rows summed in
proportion to ``exp(x)``, both scaled where the maximum rises; at the end of the walk that sum is

.. math:: \frac{\partial \log p_t}{\partial h_t} = (1 - p_{ty}) W_y - \sum_{v \ne y} p_{tv} W_v .

The label is kept apart from the other logits: :math:`\log p = -\log(1 + e^{r - x_y})` with r their log-sum-exp, and
:math:`1 - p`, are exact where p is close to 1.

The loss's gradient reaches a token as one number g that is known in the backward pass only, but it enters last:

.. math:: \frac{\partial L}{\partial h_t} = g_t \frac{\partial \log p_t}{\partial h_t}, \qquad
          \frac{\partial L}{\partial W} = s^\top (g h), \quad s_{tv} = [v = y_t] - p_{tv} .

So a frozen head, or a selective ascent, costs the two products of the plain head. For the weight's gradient the
backward pass computes the tiles again, but for the last one, which is kept: a single tile costs three products, as the
plain head, many cost four. A part of the weight meets all tokens at once: its gradient is written once, in its own
dtype, and each part of the weight is read once for each product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops._checks import check_first_order
from ..ops.sequence_logps import check_labels
from . import linear_tiles as tiling
from .linear_tiles import Tiles
from .linear_walk import Walk


@torch.library.custom_op("shapo_kernels::linear_token_logps", mutates_args=())
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    shift: int,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    chunk_bytes: int | None,
    group: str | None,
    statistics: bool,
    keep_hidden: bool,
    keep_weight: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities ``[B, T]``, 0 where a token does not count; statistics ``[3, B, T]``; what backward needs.

    Args:
        dtype: what hidden states and weight are rounded to.
        statistics: entropy, mean logit, and 1 where the label is the (first) most likely token.
        keep_hidden, keep_weight: whether their gradients may be asked for.
        padded: sizes of the kept tensors follow from shapes alone, as a compiled graph must know them.

    Returns:
        logps, statistics, index ``[n]`` of labelled tokens, per_token ``[3, n]`` (log p, maximum, sum of exponentials),
        directions ``[n, H]`` (d log p / d hidden), slopes (of the last tile, flat).
    """
    rows, length, width = hidden.shape
    where = (labels[:, shift:] != ignore_index).nonzero()
    index = where[:, 0] * length + where[:, 1]
    targets, pg = labels[where[:, 0], where[:, 1] + shift].long(), _resolve(group)
    targets, held = _own_targets(targets, ignore_index, weight, pg)
    room = rows * length if padded else len(index)
    tiles = tiling.cut(len(index), weight, dtype, chunk_bytes, keeps=keep_weight)
    per_token = torch.zeros((3, room), dtype=tiles.sum, device=hidden.device)
    directions = per_token.new_empty((room if keep_hidden else 0, width))
    facts = per_token.new_zeros((3 if statistics else 0, len(index)))
    capacity = (
        tiling.capacity(room, weight, dtype, chunk_bytes) if padded else tiles.rows_of_tile * tiles.columns_of_tile
    )
    buffer = torch.empty(capacity, dtype=tiles.tile, device=hidden.device)
    spare = buffer if tiles.factor == tiles.tile else torch.empty_like(buffer, dtype=tiles.factor)
    with torch.autocast(hidden.device.type, enabled=False):
        inputs = tiling.labelled_inputs(hidden, where, dtype, tiles)
        for part in tiles.token_parts():
            walk = Walk(inputs[part], targets[part], held[part], tiles, scale, softcap, statistics)
            sums = directions[part].zero_() if keep_hidden else None
            for columns in tiles.column_parts():
                factor = tiling.weight_rows(weight, columns, dtype, tiles)
                logits = tiling.project(walk.inputs, factor, bias, columns, scale, softcap, buffer)
                bend = tiling.bend_of(logits, softcap) if keep_hidden or keep_weight else None
                walk.see(logits, columns)
                last = columns.stop == tiles.columns
                if last:
                    per_token[:, part] = walk.end(pg)
                if not (keep_hidden or (keep_weight and tiles.is_last(part, columns))):
                    continue
                if last:
                    tiling.slope_(logits, walk.targets, columns, per_token[:, part], scale)
                else:
                    walk.exponentials_(logits)
                slope = tiling.operand(logits if bend is None else logits.mul_(bend), spare)
                if sums is not None:
                    sums.mul_(walk.rescale(last, per_token[:, part], scale)[:, None])
                    tiling.add_product_(sums, slope, factor)
            if sums is not None:
                _add_label_rows_(sums, walk, weight, per_token[0, part], dtype, scale, softcap, tiles)
            if statistics:
                facts[:, part] = walk.facts()
    logps = per_token.new_zeros(rows * length)
    logps[index] = per_token[0, : len(index)]
    spread = facts.new_zeros((len(facts), rows * length))
    spread[:, index] = facts
    kept = spare if keep_weight else spare.new_empty(0)
    if padded:
        index = torch.cat([index, index.new_full((room - len(index),), -1)])
    return logps.view(rows, length), spread.view(-1, rows, length), index, per_token, directions, kept


@torch.library.custom_op("shapo_kernels::linear_token_logps_gradient", mutates_args=())
def linear_token_logps_gradient(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    per_token: Tensor,
    directions: Tensor,
    slopes: Tensor,
    ignore_index: int,
    shift: int,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    chunk_bytes: int | None,
    group: str | None,
    padded: bool,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad * logps)`` with respect to hidden, weight and bias; empty where they are not wanted."""
    length, width = hidden.shape[1:]
    count = int((labels[:, shift:] != ignore_index).sum()) if padded else len(index)
    index = index[:count]
    where = torch.stack([index // length, index % length], 1)
    g, pg = grad.reshape(-1)[index], _resolve(group)
    grad_hidden = torch.zeros(hidden.shape if wants_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    if wants_hidden:
        by_row = directions[:count] * g[:, None]
        if pg is not None:
            dist.all_reduce(by_row, group=pg)
        grad_hidden.view(-1, width)[index] = by_row.to(hidden.dtype)
        del by_row
    tiles = tiling.cut(count, weight, dtype, chunk_bytes, keeps=True)
    single = count <= tiles.rows_of_tile
    # One part of tokens writes a gradient once; several add to it, and not in 16 bits.
    total = torch.zeros if not count else torch.empty if single else torch.zeros
    sum_dtype = weight.dtype if single else torch.promote_types(weight.dtype, tiles.sum)
    grad_weight = total(weight.shape if wants_weight else (0,), dtype=sum_dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight) if wants_bias else 0, dtype=tiles.sum, device=weight.device)
    if wants_weight or wants_bias:
        targets, _ = _own_targets(labels[where[:, 0], where[:, 1] + shift].long(), ignore_index, weight, pg)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = tiling.labelled_inputs(hidden, where, dtype, tiles)
            first_tile = (min(count, tiles.rows_of_tile), tiles.columns_of_tile)
            alone = single and tiles.columns_of_tile >= tiles.columns
            buffer = torch.empty(0 if alone else first_tile[0] * first_tile[1], dtype=tiles.tile, device=hidden.device)
            spare = buffer if tiles.factor == tiles.tile else torch.empty_like(buffer, dtype=tiles.factor)
            for part in tiles.token_parts():
                weighted = (inputs[part].to(tiles.sum) * g[part, None]).to(tiles.factor)
                for columns in tiles.column_parts():
                    if tiles.is_last(part, columns):
                        shape = (part.stop - part.start, columns.stop - columns.start)
                        slope = slopes[: shape[0] * shape[1]].view(shape)
                    else:
                        factor = tiling.weight_rows(weight, columns, dtype, tiles)
                        logits = tiling.project(inputs[part], factor, bias, columns, scale, softcap, buffer)
                        bend = tiling.bend_of(logits, softcap)
                        tiling.slope_(logits, targets[part], columns, per_token[:, part], scale)
                        slope = tiling.operand(logits if bend is None else logits.mul_(bend), spare)
                    if wants_weight:
                        tiling.put_product_(grad_weight[columns], slope.t(), weighted, add=not single)
                    if wants_bias:
                        grad_bias[columns] += tiling.multiply(slope.t(), g[part, None].to(tiles.factor), tiles.sum)[
                            :, 0
                        ]
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_label_rows_(
    sums: Tensor,
    walk: Walk,
    weight: Tensor,
    logps: Tensor,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    tiles: Tiles,
) -> None:
    """Adds ``(1 - p_y) W_y`` where the last tile, which has its labels in place, has not done so."""
    last = (tiles.columns - 1) // tiles.columns_of_tile * tiles.columns_of_tile
    share = -scale * torch.expm1(logps)
    if softcap is not None:
        share = share * (1 - (walk.label_logit / softcap).square()).to(share.dtype)
    elsewhere = ~walk.held | (walk.targets >= last)
    rows = walk.targets.masked_fill(elsewhere, 0)
    share = share.masked_fill(elsewhere, 0.0)
    for part in tiling.parts(len(sums), max(1, tiling.BLOCK_ELEMENTS // weight.shape[1])):
        sums[part] += weight.detach()[rows[part]].to(dtype).to(sums.dtype).mul_(share[part, None])


# -- a vocabulary over ranks


def _resolve(group: str | None) -> Any:
    return None if group is None else dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


def _own_targets(targets: Tensor, ignore_index: int, weight: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Labels counted from this rank's first row, its number of rows where it does not hold them; and where it does.

    Raises:
        ValueError: on the CPU, for a label outside the vocabulary; other devices assert it.
    """
    if group is None:
        check_labels(targets, ignore_index, len(weight))
        return targets, torch.ones_like(targets, dtype=torch.bool)
    own = torch.tensor([len(weight)], device=weight.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    rows = torch.cat(parts)
    if targets.device.type == "cpu":
        check_labels(targets, ignore_index, int(rows.sum()))
    else:
        torch._assert_async(
            ((targets >= 0) & (targets < rows.sum())).all(), "labels contains no token of the vocabulary"
        )
    local = targets - rows[: dist.get_rank(group)].sum()
    held = (local >= 0) & (local < len(weight))
    return local.masked_fill(~held, len(weight)), held


# -- autograd and torch.compile


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *options = inputs
    _, spread, index, per_token, directions, slopes = output
    ctx.save_for_backward(hidden, weight, bias, labels, index, per_token, directions, slopes)
    ctx.mark_non_differentiable(spread, index, per_token, directions, slopes)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.weight_node = options, weight.grad_fn


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_first_order("linear_sequence_logps", "use a linear layer and torch.log_softmax")
    if grad is None:
        return (None,) * 15
    hidden, weight, bias, *saved = ctx.saved_tensors
    *options, _, _, _, padded = ctx.options
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    wants_weight = wants_weight and _is_wanted(ctx.weight_node)
    grads = linear_token_logps_gradient(
        grad, hidden, weight, bias, *saved, *options, padded, wants_hidden, wants_weight, wants_bias
    )
    wanted = (wants_hidden, wants_weight, wants_bias)
    return (*(value if want else None for value, want in zip(grads, wanted, strict=True)), *(None,) * 12)


linear_token_logps.register_autograd(_backward, setup_context=_setup_context)


@linear_token_logps.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    _, _, dtype, _, _, chunk_bytes, _, statistics, keep_hidden, keep_weight, padded = options
    rows, length, width = hidden.shape
    room = rows * length if padded else torch.library.get_ctx().new_dynamic_size()
    factor, _, sums = tiling.dtypes(weight.device, dtype)
    new = hidden.new_empty
    return (
        new((rows, length), dtype=sums),
        new((3 if statistics else 0, rows, length), dtype=sums),
        labels.new_empty(room, dtype=torch.int64),
        new((3, room), dtype=sums),
        new((room if keep_hidden else 0, width), dtype=sums),
        new(tiling.capacity(room, weight, dtype, chunk_bytes) if keep_weight else 0, dtype=factor),
    )


@linear_token_logps_gradient.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, wants_hidden, wants_weight, wants_bias = others
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        weight.new_empty(len(weight) if wants_bias else 0),
    )


def _is_wanted(node: torch.autograd.graph.Node | None) -> bool:
    """Whether the running backward pass goes on to ``node``.

    ``needs_input_grad`` says only that an input requires a gradient, so ``autograd.grad(loss, others)`` would have the
    largest product of the backward pass done for nothing: a selective ascent never asks for the head's gradient.
    """
    # What torch.autograd.graph.register_multi_grad_hook asks; where a later torch lacks it, the gradient is computed.
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    return node is None or ask is None or torch.compiler.is_compiling() or bool(ask(node))
