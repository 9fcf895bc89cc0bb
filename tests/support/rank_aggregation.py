"""What each rank of the test of aggregations does: its rows of a batch, at once and in micro-batches."""

import torch
import torch.distributed as dist

from shapo_kernels import losses
from tests.support.ranks import on_rank


class Pairs:
    """Losses of pairs that share parameters, as a model's do."""

    def __init__(self, rows=13):
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        self.parameters = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)

    def losses(self, rows):
        return torch.nn.functional.softplus(self.inputs[rows] @ self.parameters) * 3

    def counts(self, rows):
        """Tokens of the chosen responses."""
        return (torch.arange(len(self.inputs)) + 1)[rows]

    def gradient(self):
        gradient, self.parameters.grad = self.parameters.grad, None
        return gradient


def aggregate(pairs, rows, kind, **keywords):
    """Dr.DPO of a beta', the mean where `kind` is None, the likelihood where it is "nll"."""
    if kind == "nll":
        return losses.chosen_nll(-pairs.losses(rows), pairs.counts(rows), **keywords)
    if kind is None:
        return losses.mean(pairs.losses(rows), **keywords)
    return losses.drdpo(pairs.losses(rows), beta_prime=kind, **keywords)


def averaged(gradient):
    """What DDP does."""
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


def both_ways(case):
    """(value, gradient averaged over the ranks) of the batch at once, and of its micro-batches' shares."""
    group, pairs, kind = dist.group.WORLD, Pairs(), case["kind"]
    rows = torch.arange(13)[case["first"] :] if dist.get_rank() else torch.arange(13)[: case["first"]]
    loss = aggregate(pairs, rows, kind, group=group)
    loss.backward()
    at_once = loss.detach(), averaged(pairs.gradient())
    micro_batches = rows.split(3) if len(rows) else (rows,)
    with torch.no_grad():
        all_losses = [pairs.losses(part) for part in micro_batches]
        beta_prime = None if kind == "nll" else kind
        whole = losses.whole_batch(
            all_losses, beta_prime=beta_prime, group=group, chosen_counts=pairs.counts(rows) if kind == "nll" else None
        )
    value = torch.zeros((), dtype=torch.float64)
    for part in micro_batches:
        share = aggregate(pairs, part, kind, whole=whole)
        share.backward()
        value += share.detach()
    dist.all_reduce(value)
    return [at_once, (value / dist.get_world_size(), averaged(pairs.gradient()))]


if __name__ == "__main__":
    on_rank(both_ways)
