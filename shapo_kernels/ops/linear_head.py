r"""The head's two operators: log-probabilities from hidden states and the head's weight, forward and backward.

They are opaque to `torch.compile` and do not check their arguments. Only labelled tokens are computed, in tiles
`[tokens, part of the vocabulary]` of logits `x`. As attention does with its keys and values, a walk over the
vocabulary keeps for each token the log-sum-exp so far and the weight's rows summed in
proportion to `exp(x)`, both scaled where the maximum rises; at the end of the walk that sum is

.. math:: \frac{\partial \log p_t}{\partial h_t} = (1 - p_{ty}) W_y - \sum_{v \ne y} p_{tv} W_v .

The label is kept apart from the other logits: :math:`\log p = -\log(1 + e^{r - x_y})` with r their log-sum-exp, and
:math:`1 - p`, are exact where p is close to 1.

The loss's gradient reaches a token as one number g that is known in the backward pass only, but it enters last:

.. math:: \frac{\partial L}{\partial h_t} = g_t \frac{\partial \log p_t}{\partial h_t}, \qquad
          \frac{\partial L}{\partial W} = s^\top (g h), \quad s_{tv} = [v = y_t] - p_{tv} .

So a frozen head, or a selective ascent, costs the two products of the plain head. For the weight's gradient the
backward pass computes the tiles again except the last one, which is kept: a single tile costs three products, like the
plain head; several cost four. Each part of the weight is multiplied with all tokens at once: its gradient is written
once, in its own dtype, and the part is read once for each product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..interop.torch_private import group_of_name
from . import linear_tiles as tiling
from ._checks import check_first_order, check_label_values
from ._schemas import OPERATORS
from .linear_tiles import HeadOptions, Tiles
from .linear_walk import Walk, walk
from .products import add_product_, multiply, put_product_, unit_of


def _custom_op(name: str, function: Any) -> Any:
    operator = OPERATORS[name]
    made = torch.library.custom_op(f"shapo_kernels::{name}", function, mutates_args=(), schema=operator.signature)
    made.register_fake(operator.fake)
    return made


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities `[B, T]`, 0 where a token does not count; statistics `[3, B, T]`; what backward needs.

    Args:
        options: of `HeadOptions`, then whether the gradients of hidden states and of the weight may be asked for.

    Returns:
        logps, statistics, index `[n]` of labelled tokens, per_token `[3, n]` (log p, maximum, sum of exponentials),
        directions `[n, H]` (d log p / d hidden), slopes (of the last tile, flat), and the plan, four numbers on the
        CPU: labelled tokens, this rank's first row, the most rows of a rank, the fewest elements of a rank's tile.
    """
    *flat, keep_hidden, keep_weight = options
    head = HeadOptions(*flat)
    rows, length, width = hidden.shape
    where = (labels[:, head.shift :] != head.ignore_index).nonzero()  # the one wait for the device
    index = where[:, 0] * length + where[:, 1]
    targets, group = labels[where[:, 0], where[:, 1] + head.shift].long(), _resolve(head.group)
    plan = _plan(len(index), targets, weight, head, group)
    targets, held = _own_targets(targets, weight, plan, group)
    room = rows * length if head.padded else len(index)
    tiles = _cut(plan, weight, head, keeps=keep_weight)
    per_token = torch.zeros((3, room), dtype=tiles.sum, device=hidden.device)
    directions = per_token.new_empty((room if keep_hidden else 0, width))
    facts = per_token.new_zeros((3 if head.statistics else 0, len(index)))
    most = tiles.rows_of_tile * tiles.columns_of_tile
    if head.padded and keep_weight:
        most = tiling.capacity(room, weight, head)
    buffer = torch.empty(most, dtype=tiles.tile, device=hidden.device)
    spare = buffer if tiles.factor == tiles.tile else torch.empty_like(buffer, dtype=tiles.factor)
    with torch.autocast(hidden.device.type, enabled=False):
        inputs = tiling.labelled_inputs(hidden, where, head, tiles)
        offsets = tiling.rounded(bias, tiles)
        for part in tiles.token_parts():
            seen = walk(inputs[part], targets[part], held[part], tiles, head)
            sums = directions[part].zero_() if keep_hidden else None
            for columns in tiles.column_parts():
                factor = tiling.weight_rows(weight, columns, head, tiles)
                tile = tiling.project(seen.inputs, factor, buffer)
                to = spare if keep_hidden or (keep_weight and tiles.is_last(part, columns)) else None
                slope = seen.take(tile, offsets, columns, to, sums, per_token[:, part], group)
                if sums is not None and slope is not None:
                    add_product_(sums, slope, factor)
            if sums is not None and tiles.columns:
                _add_label_rows_(sums, seen, weight, per_token[0, part], head, tiles)
            if head.statistics:
                facts[:, part] = seen.facts()
    logps = per_token.new_zeros(rows * length)
    logps[index] = per_token[0, : len(index)]
    spread = facts.new_zeros((len(facts), rows * length))
    spread[:, index] = facts
    kept = spare if keep_weight else spare.new_empty(0)
    if head.padded:
        index = torch.cat([index, index.new_full((room - len(index),), -1)])
    return logps.view(rows, length), spread.view(len(facts), rows, length), index, per_token, directions, kept, plan


def _gradient(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    per_token: Tensor,
    directions: Tensor,
    slopes: Tensor,
    plan: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sum(grad * logps)` with respect to hidden, weight and bias; empty where they are not wanted."""
    *flat, wants_hidden, wants_weight, wants_bias = options
    head = HeadOptions(*flat)
    length, width = hidden.shape[1:]
    count, group = int(plan[0]), _resolve(head.group)
    index = index[:count]
    g = grad.reshape(-1)[index]
    grad_hidden = torch.zeros(hidden.shape if wants_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    if wants_hidden:
        by_row = directions[:count] * g[:, None]
        if group is not None:
            dist.all_reduce(by_row, group=group)
        grad_hidden.view(hidden.shape[0] * length, width)[index] = by_row.to(hidden.dtype)
        del by_row
    tiles = _cut(plan, weight, head, keeps=True)
    # One part of tokens writes a gradient once; several add to it, and not in 16 bits.
    single = 0 < count <= tiles.rows_of_tile
    sum_dtype = weight.dtype if single else torch.promote_types(weight.dtype, tiles.sum)
    total = torch.empty if single else torch.zeros
    grad_weight = total(weight.shape if wants_weight else (0,), dtype=sum_dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight) if wants_bias else 0, dtype=tiles.sum, device=weight.device)
    to = (grad_weight if wants_weight else None, grad_bias if wants_bias else None)
    put_weight_gradient_(to, g, (hidden, weight, bias, labels), index, per_token, slopes, plan, head, add=not single)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def put_weight_gradient_(
    to: tuple[Tensor | None, Tensor | None],
    g: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    index: Tensor,
    per_token: Tensor,
    slopes: Tensor,
    plan: Tensor,
    head: HeadOptions,
    *,
    add: bool,
) -> None:
    """Weight's and bias's gradient of `sum(g * logps)` into `to`: the bias's is added, the weight's with `add`.

    Args:
        g: `[n]`, of the labelled tokens `index`.
        inputs: hidden states, weight, bias and labels; what follows is what `linear_token_logps` returned for them.
    """
    grad_weight, grad_bias = to
    hidden, weight, bias, labels = inputs
    if (grad_weight is None and grad_bias is None) or not len(weight):
        return
    tiles, count = _cut(plan, weight, head, keeps=True), len(index)
    length, width = hidden.shape[1:]
    where = torch.stack([index // max(length, 1), index % max(length, 1)], 1)
    targets = labels[where[:, 0], where[:, 1] + head.shift].long()
    targets, _ = _own_targets(targets, weight, plan, _resolve(head.group))
    with torch.autocast(hidden.device.type, enabled=False):
        rows = tiling.labelled_inputs(hidden, where, head, tiles)
        alone = count <= tiles.rows_of_tile and tiles.columns_of_tile >= tiles.columns
        elements = 0 if alone else min(count, tiles.rows_of_tile) * tiles.columns_of_tile
        buffer = torch.empty(elements, dtype=tiles.tile, device=hidden.device)
        spare = buffer if tiles.factor == tiles.tile else torch.empty_like(buffer, dtype=tiles.factor)
        rows_at_once = max(1, tiling.BLOCK_ELEMENTS // max(1, width))
        # Upstream gradients that no GradScaler has scaled yet may be too small for float16.
        wider = grad_weight is None or grad_weight.dtype != tiles.factor
        unit = unit_of(g) if tiles.factor == torch.float16 and wider else None
        g = g if unit is None else g / unit
        offsets = tiling.rounded(bias, tiles)
        for part in tiles.token_parts():
            weighted = (rows[part].to(tiles.sum) * g[part, None]).to(tiles.factor)
            for columns in tiles.column_parts():
                if tiles.is_last(part, columns):
                    shape = (part.stop - part.start, columns.stop - columns.start)
                    slope = slopes[: shape[0] * shape[1]].view(shape)
                else:
                    factor = tiling.weight_rows(weight, columns, head, tiles)
                    tile = tiling.project(rows[part], factor, buffer)
                    slope = tiling.slopes(tile, spare, targets[part], offsets, columns, per_token[:, part], head)
                if grad_weight is not None:
                    put_product_(grad_weight[columns], slope.t(), weighted, add=add, rows=rows_at_once, unit=unit)
                if grad_bias is not None:
                    by_column = multiply(slope.t(), g[part, None].to(tiles.factor), tiles.sum)[:, 0]
                    grad_bias[columns] += by_column if unit is None else by_column * unit


linear_token_logps = _custom_op("linear_token_logps", _forward)
linear_token_logps_gradient = _custom_op("linear_token_logps_gradient", _gradient)


def _add_label_rows_(sums: Tensor, seen: Walk, weight: Tensor, logps: Tensor, head: HeadOptions, tiles: Tiles) -> None:
    """Adds `(1 - p_y) W_y` where the last tile, which has its labels in place, has not done so."""
    last = (tiles.columns - 1) // tiles.columns_of_tile * tiles.columns_of_tile
    share = -head.scale * torch.expm1(logps)
    if head.softcap is not None:
        share = share * (1 - (seen.label_logit / head.softcap).square()).to(share.dtype)
    elsewhere = ~seen.held | (seen.targets >= last)
    rows = seen.targets.masked_fill(elsewhere, 0)
    share = share.masked_fill(elsewhere, 0.0)
    for part in tiling.parts(len(sums), max(1, tiling.BLOCK_ELEMENTS // max(1, weight.shape[1]))):
        sums[part] += weight.detach()[rows[part]].to(head.dtype).to(sums.dtype).mul_(share[part, None])


# -- a vocabulary over ranks


def _resolve(group: str | None) -> Any:
    return None if group is None else group_of_name(group)


def _plan(count: int, targets: Tensor, weight: Tensor, head: HeadOptions, group: Any) -> Tensor:
    """The four numbers of `_forward`'s plan, the last two the same on all ranks.

    Raises:
        ValueError: on the CPU, for a label outside the vocabulary; other devices assert it.
    """
    own = [len(weight), tiling.limit(weight, head)]
    first, every = 0, [own]
    if group is not None:
        mine = torch.tensor(own, device=weight.device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine, group=group)
        every = torch.stack(found).tolist()
        first = sum(rows for rows, _ in every[: dist.get_rank(group)])
    check_label_values(targets, head.ignore_index, sum(rows for rows, _ in every))
    return torch.tensor([count, first, max(rows for rows, _ in every), min(room for _, room in every)], device="cpu")


def _cut(plan: Tensor, weight: Tensor, head: HeadOptions, *, keeps: bool) -> Tiles:
    count, _, widest, room = plan.tolist()
    return tiling.cut(count, weight, head, keeps=keeps, widest=widest, room=room)


def _own_targets(targets: Tensor, weight: Tensor, plan: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Labels counted from this rank's first row, its number of rows where it does not hold them; and where it does."""
    if group is None:
        return targets, torch.ones_like(targets, dtype=torch.bool)
    local = targets - int(plan[1])
    held = (local >= 0) & (local < len(weight))
    return local.masked_fill(~held, len(weight)), held


# -- autograd and torch.compile


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *options = inputs
    _, spread, index, per_token, directions, slopes, plan = output
    ctx.save_for_backward(hidden, weight, bias, labels, index, per_token, directions, slopes, plan)
    ctx.mark_non_differentiable(spread, index, per_token, directions, slopes, plan)
    ctx.set_materialize_grads(False)
    ctx.head, ctx.weight_node = options[:-2], weight.grad_fn


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check_first_order("linear_sequence_logps", "use a linear layer and torch.log_softmax")
    rest = (None,) * (len(ctx.head) + 3)
    if grad is None:
        return (None, None, None, *rest)
    hidden, weight, bias, *saved = ctx.saved_tensors
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    wants_weight = wants_weight and _is_wanted(ctx.weight_node)
    wanted = (wants_hidden, wants_weight, wants_bias)
    grads = linear_token_logps_gradient(grad, hidden, weight, bias, *saved, *ctx.head, *wanted)
    return (*(value if want else None for value, want in zip(grads, wanted, strict=True)), *rest)


linear_token_logps.register_autograd(_backward, setup_context=_setup_context)


def _is_wanted(node: torch.autograd.graph.Node | None) -> bool:
    """Whether the running backward pass goes on to `node`.

    `needs_input_grad` says only that an input requires a gradient, so `autograd.grad(loss, others)` would have the
    largest product of the backward pass done for nothing: a selective ascent never asks for the head's gradient.
    """
    # What torch.autograd.graph.register_multi_grad_hook asks; where a later torch lacks it, the gradient is computed.
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    return node is None or ask is None or torch.compiler.is_compiling() or bool(ask(node))
