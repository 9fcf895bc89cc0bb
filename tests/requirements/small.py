"""Models and losses small enough to be checked to the bit."""

import torch
from torch import nn

SELECTED = {"2.weight": [1, 5, 20]}


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step=0, rows=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype) for n in (8, 3))
    return x, y


def loss_of(model, step=0, rows=12):
    """The mean squared error of a batch, as a callable."""
    dtype = next(model.parameters()).dtype
    x, y = batch(step, rows, dtype)
    return lambda: (model(x) - y).square().mean()


def closure_of(wrapper, loss):
    def closure():
        wrapper.optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def bits(model):
    return [p.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) for p in model.parameters()]


def same_bits(model, before):
    return all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


def assert_close(model, other, rtol=1e-9, atol=1e-11):
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=atol)
