"""A ShaPO update, the same one written out, and a model's weights bit by bit, for the tests of the optimizer."""

import copy
import itertools

import pytest
import torch
from torch import nn

import shapo_kernels as sk

F64 = torch.float64
LAYER = sk.Subspace({"layer.weight": [1, 3]})
COMBINATIONS = list(itertools.product(["selective", "grad"], ["in_place", "delta"]))


def wrap(model, subspace, *, base=torch.optim.SGD, lr=0.1, rho=0.3, **options):
    return sk.ShaPOOptimizer(base(model.parameters(), lr=lr), model, subspace, rho=rho, **options)


def update(opt, model, data, loss, *, moves=True):
    due = opt.due
    with opt.ascent():
        opt.ascend(loss(model, data))
    with opt.perturbed():
        loss(model, data).backward()
    if due and moves:
        assert_moved(opt)
    opt.step()
    opt.zero_grad()


def closure_for(opt, model, data, loss):
    def closure():
        opt.zero_grad()
        value = loss(model, data)
        value.backward()
        return value

    return closure


def assert_moved(opt):
    """Two ways of an update agree where nothing moves too: the last one must have moved something."""
    assert opt.stats["epsilon_norm"] > 0


def bits(model):
    return [p.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8) for p in model.parameters()]


def same_bits(model, before):
    return all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


def refuses_in_one_line(message):
    return pytest.raises(RuntimeError, match=rf"^[^\n]*{message}[^\n]*$")


def written_out(model, subspace, data, loss):
    """One update of gradient descent (0.1) at theta + eps (0.3), whatever the model computes."""
    names = dict(model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(loss(model, data), list(names.values())), strict=True))
    selected = {n: gradients[n].index_select(subspace.axis(n), subspace[n]) for n in subspace}
    norm = torch.cat([g.flatten() for g in selected.values()]).norm()
    before = {n: names[n].detach().clone() for n in subspace}
    with torch.no_grad():
        for n, g in selected.items():
            names[n].index_add_(subspace.axis(n), subspace[n], 0.3 * g / norm)
    descent = torch.autograd.grad(loss(model, data), list(names.values()))
    with torch.no_grad():
        for n, weight in before.items():
            names[n].copy_(weight)
        for parameter, gradient in zip(names.values(), descent, strict=True):
            parameter.sub_(gradient, alpha=0.1)


def assert_as_written_out(model, subspace, data, loss, **options):
    expected = copy.deepcopy(model)
    written_out(expected, subspace, data, loss)
    update(wrap(model, subspace, **options), model, data, loss)
    for mine, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


class Between(nn.Module):
    """Some layer that is applied to an activation, and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(8, 8), layer, nn.Linear(8, 3)
        self.to(F64)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.first(x))))


def between(layer):
    torch.manual_seed(0)
    return Between(layer())
