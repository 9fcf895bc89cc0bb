"""What is kept of each token while its vocabulary is walked tile by tile. See `linear_head`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from . import linear_tiles as tiling
from .linear_tiles import COUNTED, HeadOptions, Tiles


class Walk:
    """Running sums of some tokens over the vocabulary: the log-sum-exp of all logits but the label's, and that one."""

    def __init__(self, inputs: Tensor, targets: Tensor, held: Tensor, tiles: Tiles, head: HeadOptions) -> None:
        self.inputs, self.targets, self.held = inputs, targets, held
        self._head, self._statistics, self._columns = head, head.statistics, tiles.columns
        self.rest = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=targets.device)
        self.label_logit = self.rest.clone()
        self.highest = self.rest.to(tiles.sum)
        self._previous = self.highest
        self._nothing = torch.zeros_like(targets)
        if head.statistics:
            self._entropy, self._sum = torch.zeros_like(self.rest), torch.zeros_like(self.rest)
            self._best, self._argmax = self.rest.clone(), torch.zeros_like(targets)

    def take(
        self,
        tile: Tensor,
        bias: Tensor | None,
        columns: slice,
        spare: Tensor | None,
        sums: Tensor | None,
        per_token: Tensor,
        group: Any,
    ) -> Tensor | None:
        """Join a tile of products to what is known.

        Args:
            spare: memory for the next product's factor, maybe the tile's; `None` where there is no such product. Of the
                last tile it is the slopes, of others their exponentials below the maximum so far.
            sums: `[n, width]` over the tiles before; scaled to what this tile's product is to be added to.
            per_token: `[3, n]`, written at the last tile: see :meth:`end`.

        Returns:
            The factor.
        """
        logits = tiling.finish_(tile, bias, columns, self._head)
        bend = None if spare is None else tiling.bend_of(logits, self._head.softcap)
        self._see(logits, columns)
        last = columns.stop == self._columns
        if last:
            per_token.copy_(self.end(group))
        if sums is not None:
            sums.mul_(self._rescale(last, per_token)[:, None])
        if spare is None:
            return None
        if last:
            return tiling.slope(logits, spare, self.targets, columns, per_token, self._head.scale, bend)
        return tiling.exponentials(logits, spare, self.highest, bend)

    def _see(self, logits: Tensor, columns: slice) -> None:
        """Add a tile to the sums; the label's logit becomes `-inf` in it."""
        if not len(logits) or not logits.shape[1]:
            return
        if self._statistics:
            best, at = logits.max(1)
            better = best.double() > self._best
            self._best = torch.where(better, best.double(), self._best)
            self._argmax = torch.where(better, at + columns.start, self._argmax)
            self._sum += logits.sum(1, dtype=self.highest.dtype)
        here = (self.targets >= columns.start) & (self.targets < columns.stop)
        at = torch.where(here, self.targets - columns.start, 0)[:, None]
        picked = logits.gather(1, at)
        self.label_logit = torch.where(here, picked[:, 0].double(), self.label_logit)
        logits.scatter_(1, at, picked.masked_fill(here[:, None], -torch.inf))
        _, normalizers, entropy = backends.function(logits.device, "token_logps")(
            logits[None], self._nothing[None], COUNTED, 0, 1, 1, self._statistics
        )
        highest, sums = normalizers[:, 0]
        tile = highest.double() + sums.double().log()
        if self._statistics:
            self._entropy = _join_entropies(self.rest, self._entropy, tile, entropy[0].double())
        self.rest = torch.logaddexp(self.rest, tile)
        self._previous, self.highest = self.highest, torch.maximum(self.highest, highest)

    def _rescale(self, last: bool, per_token: Tensor) -> Tensor:
        """What the sum over the tiles before this one is to be multiplied with."""
        _, highest, total = per_token
        now = highest if last else self.highest
        ratio = torch.where(self._previous == now, 1.0, torch.exp(self._previous - now))
        return -self._head.scale * ratio / total if last else ratio

    def end(self, group: Any) -> Tensor:
        """`[3, n]`: log-probability of the label, maximum and sum of exponentials over the whole vocabulary."""
        if group is not None:
            self._join(group)
        below = torch.logaddexp(self.rest - self.label_logit, torch.zeros_like(self.rest))
        # log_softmax of an infinite logit is NaN.
        self.logp = torch.where(self.label_logit == torch.inf, torch.nan, -below)
        whole = torch.logaddexp(self.rest, self.label_logit)
        highest = torch.maximum(self.highest, self.label_logit.to(self.highest.dtype))
        total = torch.exp(whole - highest.double())
        return torch.stack([self.logp.to(highest.dtype), highest, total.to(highest.dtype)])

    def _join(self, group: Any) -> None:
        """The same over all ranks: a maximum and a sum for the log-sum-exp, the label's logit from who has it."""
        both = torch.stack([self.rest, self.highest.double()])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        rise = torch.where(self.rest == both[0], 0.0, self.rest - both[0]).exp()
        sums = torch.stack([rise, torch.where(self.held, self.label_logit, 0.0)])
        dist.all_reduce(sums, group=group)
        self.rest, self.label_logit = both[0] + sums[0].log(), sums[1]
        self.highest = both[1].to(self.highest.dtype)

    def facts(self) -> Tensor:
        entropy = _join_entropies(self.rest, self._entropy, self.label_logit, torch.zeros_like(self.rest))
        return torch.stack([entropy, self._sum / max(1, self._columns), (self._argmax == self.targets).double()])


class FusedWalk(Walk):
    """The same by one launch a tile. See `shapo_kernels.triton.linear_tile`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Maximum, sum of exponentials below it, label's logit; weighted logits, their sum, the largest and its place.
        start = torch.tensor([-torch.inf, 0, -torch.inf, 0, 0, -torch.inf, 0], dtype=torch.float64)
        self._state = torch.empty((7, len(self.targets)), dtype=torch.float64, device=self.targets.device)
        for row, value in zip(self._state, start.tolist(), strict=True):
            row.fill_(value)

    def take(
        self,
        tile: Tensor,
        bias: Tensor | None,
        columns: slice,
        spare: Tensor | None,
        sums: Tensor | None,
        per_token: Tensor,
        group: Any,
    ) -> Tensor | None:
        head, last = self._head, columns.stop == self._columns
        kernel = tiling.kernel(tile.dtype, tile.device)
        assert kernel is not None
        factor = None if spare is None else tiling.like(tile, spare)
        own = None if bias is None else bias[columns]
        common = self.targets, own, columns.start, head.scale, head.softcap, per_token
        joins = last and group is not None
        if joins:  # what the ranks know has to come between the sums and the slopes
            self._previous = self._state[0].to(self.highest.dtype)
            kernel(tile, None, *common, self._state, None, statistics=self._statistics)
        else:
            kernel(tile, factor, *common, self._state, sums, last=last, statistics=self._statistics)
        if not last:
            return factor
        highest, total, self.label_logit, weighted, self._sum, _, place = self._state
        self.highest, self.rest = highest.to(self.highest.dtype), highest + total.log()
        self._entropy, self._argmax = total.log() - weighted / total, place.long()
        if joins:
            per_token.copy_(self.end(group))
            if sums is not None:
                sums.mul_(self._rescale(last, per_token)[:, None])
            if factor is not None:
                kernel(tile, factor, *common)
        return factor


def walk(inputs: Tensor, targets: Tensor, held: Tensor, tiles: Tiles, head: HeadOptions) -> Walk:
    one_launch = tiling.kernel(tiles.tile, inputs.device) is not None
    return (FusedWalk if one_launch else Walk)(inputs, targets, held, tiles, head)


def _join_entropies(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
    """Entropy over two sets of logits from their log-sum-exps and entropies: the chain rule, no term of it negative."""
    whole = torch.logaddexp(a, b)
    shares = [(torch.exp(x - whole), whole - x, own) for x, own in ((a, of_a), (b, of_b))]
    return sum((torch.where(p == 0, 0.0, p * (surprise + own)) for p, surprise, own in shares), torch.zeros_like(a))
