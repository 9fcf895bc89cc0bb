"""The head over ranks: divided by its vocabulary it equals the whole one; a sharded weight is gathered once (L5)."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

COMMON = textwrap.dedent(
    """
    import sys
    import torch
    import torch.distributed as dist
    from shapo_kernels import losses
    from shapo_kernels.losses import linear_tiles

    linear_tiles.FEWEST_COLUMNS = 3  # a small vocabulary is cut as a large one is

    rank, world = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)

    def data(dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        hidden, weight, bias = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in ((2, 9, 6), (11, 6), (11,))
        )
        labels = torch.randint(0, 11, (2, 9), generator=generator)
        labels[0, :4] = -100
        return hidden, weight, bias, labels, torch.randn(2, generator=generator, dtype=torch.float64)
    """
)

VOCABULARY_PARALLEL = COMMON + textwrap.dedent(
    """
    rows = slice(0, 7) if rank == 0 else slice(7, 11)  # uneven parts
    for chunk_bytes in (None, 240, 48):
        for options in ({}, {"softcap": 2.0, "scale": 0.7}):
            hidden, weight, bias, labels, slope = data()
            sums, counts = losses.linear_sequence_logps(hidden, weight, labels, bias=bias, chunk_bytes=240, **options)
            expected = torch.autograd.grad((sums * slope).sum(), [hidden, weight, bias])
            mine, my_bias = (x.detach()[rows].clone().requires_grad_() for x in (weight, bias))
            own_sums, own_counts = losses.linear_sequence_logps(
                hidden, mine, labels, bias=my_bias, chunk_bytes=chunk_bytes, group=dist.group.WORLD, **options
            )
            torch.testing.assert_close(own_sums, sums, rtol=1e-12, atol=1e-12)
            assert torch.equal(own_counts, counts)
            got = torch.autograd.grad((own_sums * slope).sum(), [hidden, mine, my_bias])
            for one, other in zip(got, (expected[0], expected[1][rows], expected[2][rows])):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)

    # One graph for torch.compile, collectives and all.
    def loss(hidden, mine):
        whole = dist.group.WORLD
        return losses.linear_sequence_logps(hidden * 1.0, mine, labels, chunk_bytes=240, group=whole)[0].sum()

    inputs = [hidden, mine]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)

    # A part of the vocabulary that is masked as a whole, as padded vocabularies are.
    hidden, weight, bias, labels, slope = data()
    bias = torch.zeros(11, dtype=torch.float64)
    bias[7:] = -torch.inf
    labels = labels.clamp(max=6)
    whole, _ = losses.linear_sequence_logps(hidden, weight, labels, bias=bias)
    parts, _ = losses.linear_sequence_logps(
        hidden, weight.detach()[rows], labels, bias=bias[rows], group=dist.group.WORLD
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    try:
        losses.linear_sequence_logps(hidden, weight[rows], torch.full_like(labels, 11), group=dist.group.WORLD)
    except ValueError as error:
        assert "labels contains 11" in str(error)
    else:
        raise AssertionError("a label outside the whole vocabulary was taken")
    dist.destroy_process_group()
    """
)

FSDP2 = COMMON + textwrap.dedent(
    """
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(6, 6).double()
            self.head = nn.Linear(6, 11, bias=False).double()

        def forward(self, x):
            return torch.tanh(self.body(x))

    hidden, _, _, labels, slope = data()
    hidden = hidden.detach()

    def loss(model, rows):
        sums, _ = losses.linear_sequence_logps(model(hidden[rows]), model.head.weight, labels[rows], chunk_bytes=8 * 9)
        return (sums * slope[rows]).mean()

    alone = Model()
    loss(alone, slice(0, 2)).backward()
    mesh = init_device_mesh("cpu", (world,))
    model = Model()
    for layer in (model.body, model.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.head.weight, DTensor)
    rows = slice(rank, rank + 1)
    loss(model, rows).backward()
    for parameter, expected in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, rtol=1e-11, atol=1e-13)

    # Of the head alone: gathered for the forward pass and not again, its gradient sent once.
    states = hidden[rows].clone().requires_grad_()
    with CommDebugMode() as forward:
        sums, _ = losses.linear_sequence_logps(states, model.head.weight, labels[rows], chunk_bytes=8 * 9)
    with CommDebugMode() as backward:
        sums.sum().backward()
    for mode, name in ((forward, "all_gather"), (backward, "reduce_scatter")):
        counts = {str(operator): count for operator, count in mode.get_comm_counts().items()}
        assert len(counts) == 1 and all(name in operator and n == 1 for operator, n in counts.items()), counts
    dist.destroy_process_group()
    """
)


def run_ranks(program, ranks=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(ranks)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("program", [VOCABULARY_PARALLEL, FSDP2], ids=["vocabulary parallel", "fsdp2"])
def test_two_ranks_equal_one_process(program):
    run_ranks(program)
