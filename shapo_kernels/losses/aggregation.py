"""From one loss for each pair to the loss of a batch: the mean and Dr.DPO, exact over micro-batches and ranks; and the
likelihood of the chosen responses, which is added to either.

Three ways to have the whole batch, which agree in value and gradient:

* one tensor of all pairs: `drdpo(per_pair, beta_prime=b)`;
* each rank has a part: `drdpo(per_pair, beta_prime=b, group=torch.distributed.group.WORLD)`;
* each rank has micro-batches: `whole = whole_batch(all_per_pair, beta_prime=b, group=...)` from losses that were
  computed without a gradient, then for each micro-batch `drdpo(per_pair, beta_prime=b, whole=whole).backward()`:
  these *shares* add up, so they are not divided by the number of micro-batches.

Gradients are expected to be *averaged* over ranks, as DDP and FSDP do: each rank's gradient is the number of ranks
times its part of the whole batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops._checks import check_first_order
from ._checks import check_device, check_floating, check_positive, result_dtype


@dataclass(frozen=True)
class WholeBatch:
    """What a micro-batch needs to know about its whole batch; made by :func:`whole_batch`.

    Attributes:
        value: float64 scalar, the loss of the whole batch.
        pairs: float64 scalar, the number of pairs over all micro-batches and ranks.
        ranks: the number of processes that share the batch.
        beta_prime: Dr.DPO's parameter; `None` for the mean.
        chosen_tokens: fp64 scalar, the number of tokens of all chosen responses, for :func:`chosen_nll`; `None` where
            it was not asked for.
    """

    value: Tensor
    pairs: Tensor
    ranks: int
    beta_prime: float | None
    chosen_tokens: Tensor | None = None


def whole_batch(
    per_pair: Tensor | Sequence[Tensor],
    *,
    beta_prime: float | None = None,
    group: dist.ProcessGroup | None = None,
    chosen_counts: Tensor | None = None,
) -> WholeBatch:
    """The loss of a whole batch without a gradient, for use as `whole` with each of its micro-batches.

    Args:
        per_pair: the losses of all of this rank's pairs, as one tensor or one for each micro-batch. Any order. They
            must be the values that the micro-batches will have again: replay the random state if the model has dropout.
        beta_prime: for :func:`drdpo`; `None` for :func:`mean`.
        group: the processes that share the batch (`torch.distributed.group.WORLD` for all); `None` is this one
            alone.
        chosen_counts: tokens of the chosen responses of all of this rank's pairs, where :func:`chosen_nll` is to be
            given the result.

    Raises:
        ValueError: no pair at all, or `beta_prime` not above 0.
    """
    if beta_prime is not None:
        check_positive("beta_prime", beta_prime)
    if not isinstance(per_pair, Tensor):
        per_pair = torch.cat([part.detach() for part in per_pair])
    _check_per_pair(per_pair)
    values = per_pair.detach().double()
    if group is None:
        _check_some(values)
    ranks = 1 if group is None else dist.get_world_size(group)
    tokens = None if chosen_counts is None else _all_reduce(chosen_counts.double().sum(), group, dist.ReduceOp.SUM)
    total = torch.stack([values.sum(), values.new_full((), len(values))])
    if beta_prime is None:
        total = _all_reduce(total, group, dist.ReduceOp.SUM)
        return WholeBatch(total[0] / total[1], total[1], ranks, None, tokens)
    lowest = _all_reduce(values.min() if len(values) else values.new_full((), float("inf")), group, dist.ReduceOp.MIN)
    total[0] = torch.expm1(_below(values, lowest) / beta_prime).sum()
    total = _all_reduce(total, group, dist.ReduceOp.SUM)
    return WholeBatch(lowest - beta_prime * torch.log1p(total[0] / total[1]), total[1], ranks, beta_prime, tokens)


def _check_per_pair(per_pair: Tensor) -> None:
    check_floating("per_pair", per_pair)
    if per_pair.dim() != 1:
        raise ValueError(f"per_pair has shape {list(per_pair.shape)}: expected [B], one loss for each pair")


def _check_some(per_pair: Tensor) -> None:
    if not len(per_pair):
        raise ValueError("per_pair is empty: a batch needs at least one pair")


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, operation: Any) -> Tensor:
    if group is None:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, op=operation, group=group)
    return tensor


def mean(per_pair: Tensor, *, group: dist.ProcessGroup | None = None, whole: WholeBatch | None = None) -> Tensor:
    """The mean over the pairs of the whole batch, even if ranks or micro-batches hold unequal numbers of pairs.

    Args:
        per_pair: `[B]` losses.
        group: the processes that share the batch: returns the whole batch's mean on every rank.
        whole: from :func:`whole_batch`: returns this micro-batch's share.

    Returns:
        A scalar, float64 for float64 losses, else float32.

    Raises:
        ValueError: an empty batch, both `group` and `whole` (which was made with it), or a `whole` made for
            Dr.DPO.
    """
    _check_call(per_pair, group, whole, None)
    if whole is not None:
        share = per_pair.double().sum() * (whole.ranks / whole.pairs)
    elif group is None:
        share = per_pair.double().mean()
    else:
        whole = whole_batch(per_pair, group=group)
        share = _WithGradient.apply(per_pair.double(), (whole.ranks / whole.pairs).expand(len(per_pair)), whole.value)
    return share.to(result_dtype(per_pair))


def drdpo(
    per_pair: Tensor,
    *,
    beta_prime: float,
    group: dist.ProcessGroup | None = None,
    whole: WholeBatch | None = None,
) -> Tensor:
    """Dr.DPO: `-beta' log mean exp(-l / beta')` over the pairs of the whole batch (arXiv:2407.07880).

    Its gradient weighs pair i with `softmax(-l / beta')_i`: pairs with a large loss, which may be mislabelled, count
    less. `beta' -> inf` is the mean and `beta' -> 0` the minimum, both reached without loss of accuracy; finite for
    any finite losses, and the limit for infinite ones.

    Args:
        per_pair: `[B]` losses.
        beta_prime: finite, above 0.
        group: the processes that share the batch: returns the whole batch's loss on every rank (two small all-reduces).
        whole: from :func:`whole_batch`: returns this micro-batch's share, without communication. The shares of all
            micro-batches, averaged over ranks, add up to the whole batch's loss, and so do their gradients.

    Returns:
        A scalar, float64 for float64 losses, else float32. With `group` or `whole` it can be differentiated once;
        `create_graph=True` raises RuntimeError.

    Raises:
        ValueError: an empty batch, `beta_prime` out of range, both `group` and `whole`, or a `whole` made with
            another `beta_prime`.
    """
    check_positive("beta_prime", beta_prime)
    _check_call(per_pair, group, whole, beta_prime)
    losses = per_pair.double()
    if whole is None and group is None:
        # Shifted by the minimum, of which the value does not depend, exp cannot overflow; expm1 and log1p keep the
        # digits that log(mean(exp)) loses when beta' is large.
        lowest = losses.detach().min()
        value = lowest - beta_prime * torch.log1p(torch.expm1(_below(losses, lowest) / beta_prime).mean())
        return value.to(result_dtype(per_pair))
    shared = whole_batch(per_pair, beta_prime=beta_prime, group=group) if whole is None else whole
    # softmax(-l / beta')_i = exp((value - l_i) / beta') / pairs. It is at most 1; the bound is for losses that are not
    # those that `whole` was made of.
    weights = (torch.exp((shared.value - losses.detach()) / beta_prime) / shared.pairs).clamp(max=1) * shared.ranks
    value = shared.value if whole is None else shared.value * weights.sum()
    return _WithGradient.apply(losses, weights, value).to(result_dtype(per_pair))


def _below(losses: Tensor, lowest: Tensor) -> Tensor:
    """`lowest - losses`, which is 0 for losses that are infinite alike."""
    return torch.where(losses.isinf() & (losses == lowest), 0.0, lowest - losses)


def chosen_nll(
    policy_chosen: Tensor,
    chosen_counts: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    whole: WholeBatch | None = None,
) -> Tensor:
    """Negative log-likelihood of the chosen responses, a mean over all their tokens in the whole batch.

    `-sum_i log pi(y_w_i) / sum_i |y_w_i|`: the term of iterative RPO (arXiv:2404.19733, eq. 1) as TRL takes it, over
    the tokens of the batch and not over means of its pairs (`loss_type=["sigmoid", "sft"]`, once `rpo_alpha`).

    Args:
        policy_chosen: `[B]` sums over a response's tokens.
        chosen_counts: `[B]` their numbers of tokens. A batch without a token has the value 0.
        group: the processes that share the batch: returns the whole batch's value on every rank.
        whole: from :func:`whole_batch` with `chosen_counts`: returns this micro-batch's share.

    Returns:
        A scalar, fp64 for fp64 sums, else fp32.

    Raises:
        ValueError: an empty batch, shapes or devices that differ, `group` beside `whole`, or a `whole` that was made
            without `chosen_counts`.
    """
    _check_per_pair(policy_chosen)
    if chosen_counts.shape != policy_chosen.shape:
        raise ValueError(
            f"chosen_counts has the shape {list(chosen_counts.shape)}: expected {list(policy_chosen.shape)}"
        )
    check_device("chosen_counts", chosen_counts, "policy_chosen", policy_chosen)
    if whole is not None and group is not None:
        raise ValueError("whole has been summed over its ranks already: pass either group or whole")
    sums = -policy_chosen.double()
    if whole is not None:
        if whole.chosen_tokens is None:
            raise ValueError("whole was made without chosen_counts: pass them to whole_batch")
        share = sums.sum() * (whole.ranks / whole.chosen_tokens.clamp(min=1))
    elif group is None:
        _check_some(policy_chosen)
        share = sums.sum() / chosen_counts.double().sum().clamp(min=1)
    else:
        total = _all_reduce(torch.stack([sums.detach().sum(), chosen_counts.double().sum()]), group, dist.ReduceOp.SUM)
        tokens = total[1].clamp(min=1)
        share = _WithGradient.apply(sums, (dist.get_world_size(group) / tokens).expand(len(sums)), total[0] / tokens)
    return share.to(result_dtype(policy_chosen))


def _check_call(
    per_pair: Tensor, group: dist.ProcessGroup | None, whole: WholeBatch | None, beta_prime: float | None
) -> None:
    _check_per_pair(per_pair)
    if whole is None and group is None:
        _check_some(per_pair)
    if whole is not None and group is not None:
        raise ValueError("whole has been summed over its ranks already: pass either group or whole")
    if whole is not None and whole.beta_prime != beta_prime:
        raise ValueError(f"whole was made with beta_prime={whole.beta_prime} and is used with {beta_prime}")


class _WithGradient(torch.autograd.Function):
    """A value with a gradient that was computed beforehand, because other ranks or micro-batches contribute to it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        check_first_order("an aggregation over micro-batches or ranks", "pass all pairs as one tensor")
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None
