"""What is kept of each token while its vocabulary is walked tile by tile. See `linear_head`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from .linear_tiles import COUNTED, Tiles


class Walk:
    """Running sums of some tokens over the vocabulary: the log-sum-exp of all logits but the label's, and that one."""

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        held: Tensor,
        tiles: Tiles,
        statistics: bool,
    ) -> None:
        self.inputs, self.targets, self.held = inputs, targets, held
        self._statistics, self._columns = statistics, tiles.columns
        self.rest = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=targets.device)
        self.label_logit = self.rest.clone()
        self.highest = self.rest.to(tiles.sum)
        self._previous = self.highest
        self._nothing = torch.zeros_like(targets)
        if statistics:
            self._entropy, self._sum = torch.zeros_like(self.rest), torch.zeros_like(self.rest)
            self._best, self._argmax = self.rest.clone(), torch.zeros_like(targets)

    def see(self, logits: Tensor, columns: slice) -> None:
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

    def rescale(self, last: bool, per_token: Tensor, scale: float) -> Tensor:
        """What the sum over the tiles before this one is to be multiplied with."""
        _, highest, total = per_token
        now = highest if last else self.highest
        ratio = torch.where(self._previous == now, 1.0, torch.exp(self._previous - now))
        return -scale * ratio / total if last else ratio

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


def _join_entropies(a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor) -> Tensor:
    """Entropy over two sets of logits from their log-sum-exps and entropies: the chain rule, no term of it negative."""
    whole = torch.logaddexp(a, b)
    shares = [(torch.exp(x - whole), whole - x, own) for x, own in ((a, of_a), (b, of_b))]
    return sum((torch.where(p == 0, 0.0, p * (surprise + own)) for p, surprise, own in shares), torch.zeros_like(a))
