"""What each rank of the head's tests does: a part of the vocabulary, or a sharded weight, against the whole one."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from shapo_kernels import losses
from shapo_kernels.ops import linear_head, linear_tiles
from tests.support.ranks import on_rank

linear_tiles.FEWEST_COLUMNS = 3  # a small vocabulary is cut as a large one is


def data():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 9, 6), (11, 6), (11,))
    )
    labels = torch.randint(0, 11, (2, 9), generator=generator)
    labels[0, :4] = -100
    return hidden, weight, bias, labels, torch.randn(2, generator=generator, dtype=torch.float64)


def my_rows():
    """Uneven parts of the vocabulary."""
    return slice(0, 7) if dist.get_rank() == 0 else slice(7, 11)


def vocabulary_parallel(chunk_bytes, options, split=None, group=None):
    """`split`: where the vocabulary is cut; `chunk_bytes`: for all ranks, or one for each."""
    rows = my_rows() if split is None else (slice(0, split), slice(split, 11))[dist.get_rank()]
    chunk_bytes = chunk_bytes[dist.get_rank()] if isinstance(chunk_bytes, list) else chunk_bytes
    hidden, weight, bias, labels, slope = data()
    sums, counts = losses.linear_sequence_logps(hidden, weight, labels, bias=bias, chunk_bytes=240, **options)
    expected = torch.autograd.grad((sums * slope).sum(), [hidden, weight, bias])
    mine, my_bias = (x.detach()[rows].clone().requires_grad_() for x in (weight, bias))
    own_sums, own_counts = losses.linear_sequence_logps(
        hidden, mine, labels, bias=my_bias, chunk_bytes=chunk_bytes, group=group or dist.group.WORLD, **options
    )
    torch.testing.assert_close(own_sums, sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(own_counts, counts)
    got = torch.autograd.grad((own_sums * slope).sum(), [hidden, mine, my_bias])
    for one, other in zip(got, (expected[0], expected[1][rows], expected[2][rows]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def by_pairs(chunk_bytes, options):
    """The loss and its gradients, each rank asking its share for all of them: those of the whole vocabulary."""
    rows = my_rows()
    hidden, weight, bias, labels, slope = data()

    def share(sums, counts, prompts):
        return (sums * slope[prompts]).sigmoid().sum()

    loss = share(*losses.linear_sequence_logps(hidden, weight, labels, bias=bias, **options), torch.arange(2))
    expected = torch.autograd.grad(loss, [hidden, weight, bias])
    mine, my_bias = (x.detach()[rows].clone().requires_grad_() for x in (weight, bias))
    own, _, _ = losses.linear_preference_loss(
        hidden,
        mine,
        labels,
        share,
        bias=my_bias,
        responses=1,
        chunk_bytes=chunk_bytes,
        group=dist.group.WORLD,
        **options,
    )
    torch.testing.assert_close(own, loss, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(own, [hidden, mine, my_bias])
    for one, other in zip(got, (expected[0], expected[1][rows], expected[2][rows]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def cut_by_each_rank_alone(chunk_bytes, split=None):
    """As before the cut was common: one rank waits for a part of the tokens that the other does not have."""
    common = linear_head._plan

    def own(count, targets, weight, head, group):
        plan = common(count, targets, weight, head, group)
        plan[2:] = torch.tensor([len(weight), linear_tiles.limit(weight, head)])
        return plan

    linear_head._plan = own
    vocabulary_parallel(chunk_bytes, {}, split, dist.new_group(timeout=timedelta(seconds=5)))


def compiled():
    """One graph for torch.compile, collectives and all."""
    hidden, weight, _, labels, _ = data()
    mine = weight.detach()[my_rows()].clone().requires_grad_()

    def loss(hidden, mine):
        whole = dist.group.WORLD
        return losses.linear_sequence_logps(hidden * 1.0, mine, labels, chunk_bytes=240, group=whole)[0].sum()

    inputs = [hidden, mine]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def a_part_masked_as_a_whole():
    """As padded vocabularies are."""
    rows = my_rows()
    hidden, weight, _, labels, _ = data()
    bias = torch.zeros(11, dtype=torch.float64)
    bias[7:] = -torch.inf
    labels = labels.clamp(max=6)
    whole, _ = losses.linear_sequence_logps(hidden, weight, labels, bias=bias)
    parts, _ = losses.linear_sequence_logps(
        hidden, weight.detach()[rows], labels, bias=bias[rows], group=dist.group.WORLD
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def a_label_outside():
    hidden, weight, _, labels, _ = data()
    mine, labels = weight[my_rows()], torch.full_like(labels, 11)
    with pytest.raises(ValueError, match="labels contains 11"):
        losses.linear_sequence_logps(hidden, mine, labels, group=dist.group.WORLD)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 6).double()
        self.head = nn.Linear(6, 11, bias=False).double()

    def forward(self, x):
        return torch.tanh(self.body(x))


def sharded():
    hidden, _, _, labels, slope = data()
    hidden = hidden.detach()

    def loss(model, rows):
        sums, _ = losses.linear_sequence_logps(model(hidden[rows]), model.head.weight, labels[rows], chunk_bytes=8 * 9)
        return (sums * slope[rows]).mean()

    alone = Model()
    loss(alone, slice(0, 2)).backward()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model()
    for layer in (model.body, model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.head.weight, DTensor)
    rows = slice(dist.get_rank(), dist.get_rank() + 1)
    loss(model, rows).backward()
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, rtol=1e-11, atol=1e-13)

    # Of the head alone: gathered for the forward pass and not again, its gradient sent once.
    states = hidden[rows].clone().requires_grad_()
    with CommDebugMode() as forward:
        sums, _ = losses.linear_sequence_logps(states, model.head.weight, labels[rows], chunk_bytes=8 * 9)
    with CommDebugMode() as backward:
        sums.sum().backward()
    for mode, name in ((forward, "all_gather"), (backward, "reduce_scatter")):
        ((operator, count),) = mode.get_comm_counts().items()
        assert name in str(operator)
        assert count == 1


def check(case):
    {
        "vocabulary parallel": vocabulary_parallel,
        "by pairs": by_pairs,
        "cut by each rank alone": cut_by_each_rank_alone,
        "compiled": compiled,
        "masked": a_part_masked_as_a_whole,
        "refused": a_label_outside,
        "fsdp2": sharded,
    }[case["name"]](*case.get("arguments", ()))
    return True


if __name__ == "__main__":
    on_rank(check)
