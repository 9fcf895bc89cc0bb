"""torch.func's transforms around a perturbed model: vmap, grad, jvp and jacrev see eps, and an ascent sees them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, assert_as_written_out, between, wrap


def row_by_row(model, data):
    return vmap(lambda x, y: (model(x) - y).square().mean())(*data).mean()


def with_slopes(model, data):
    slopes = vmap(grad(lambda x: model(x).sum()))(data[0])
    return (model(data[0]) - data[1]).square().mean() + slopes.square().mean()


def with_a_tangent(model, data):
    output, tangent = jvp(model, (data[0],), (data[0].cos(),))
    return (output - data[1]).square().mean() + tangent.square().mean()


def with_a_jacobian(model, data):
    return (model(data[0]) - data[1]).square().mean() + jacrev(model)(data[0][0]).square().mean()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
@pytest.mark.parametrize("loss", [row_by_row, with_slopes, with_a_tangent, with_a_jacobian])
def test_a_loss_that_is_made_of_transforms_ascends_along_its_whole_gradient(batch, loss, ascent, perturbation, axis):
    subspace = sk.Subspace({"layer.weight": [1, 3]}, axis=axis)
    model = between(lambda: nn.Linear(8, 8))
    assert_as_written_out(model, subspace, batch(), loss, ascent=ascent, perturbation=perturbation)


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_gradients_of_each_row_are_taken_at_the_perturbed_weights(batch, loss, perturbation):
    model = between(lambda: nn.Linear(8, 8))
    opt = wrap(model, sk.Subspace({"layer.weight": [1, 3]}), perturbation=perturbation)
    weights = dict(model.named_parameters())
    with opt.ascent():
        opt.ascend(loss(model, batch()))

    def of_row(weights, x, y):
        return (functional_call(model, weights, (x,)) - y).square().mean()

    with opt.perturbed():
        rows = vmap(grad(of_row), in_dims=(None, 0, 0))(weights, *batch())
        expected = torch.autograd.grad(loss(model, batch()), list(weights.values()))
    for row, gradient in zip(rows.values(), expected, strict=True):
        torch.testing.assert_close(row.mean(0), gradient, rtol=1e-12, atol=1e-14)
