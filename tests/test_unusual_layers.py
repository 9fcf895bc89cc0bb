"""Layers and losses that are linear in name only: perturbed as the mathematics says, or refused in one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from updates import (
    COMBINATIONS,
    F64,
    LAYER,
    assert_as_written_out,
    between,
    bits,
    refuses_in_one_line,
    same_bits,
    update,
    wrap,
)

import shapo_kernels as sk


class Normalised(nn.Linear):
    def forward(self, x):
        return F.linear(x, 3 * self.weight / self.weight.norm(), self.bias)


class Twice(nn.Linear):
    """Another forward, which calls the usual one."""

    def forward(self, hidden):
        return super().forward(torch.tanh(super().forward(hidden)))


@pytest.mark.parametrize("layer", [Normalised, Twice])
@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_linear_layer_with_a_forward_of_its_own_is_differentiated_as_it_computes(batch, loss, layer, ascent):
    model = between(lambda: layer(8, 8))
    with pytest.raises(sk.SubspaceError, match="use 'in_place'"):
        wrap(model, LAYER, perturbation="delta")
    assert_as_written_out(model, LAYER, batch(), loss, ascent=ascent)


class Attention(nn.Module):
    """torch's attention reads out_proj's weight and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.attention(x, x, x)[0].squeeze(1)


@pytest.mark.parametrize("form", ["context", "closure"])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_a_weight_that_is_used_without_its_layer_is_refused_where_taps_would_miss_it(
    batch, loss, ascent, perturbation, form
):
    subspace = sk.Subspace({"layer.attention.out_proj.weight": [1, 3], "head.weight": [2]})
    model = between(Attention)
    if (ascent, perturbation) == ("grad", "in_place"):
        assert_as_written_out(model, subspace, batch(), loss, ascent=ascent, perturbation=perturbation)
        return
    opt, before = wrap(model, subspace, ascent=ascent, perturbation=perturbation), bits(model)

    def closure():
        opt.zero_grad()
        value = loss(model, batch())
        value.backward()
        return value

    with refuses_in_one_line(r"out_proj\.weight' without calling its layer"):
        opt.step(closure) if form == "closure" else update(opt, model, batch(), loss)
    assert same_bits(model, before)
    assert not opt.is_perturbed


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.chosen = 0

    def forward(self, x):
        return self.experts[self.chosen](x)


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_an_expert_that_sits_a_batch_out_is_not_perturbed_and_no_error(batch, loss, ascent, perturbation):
    model = between(Experts)
    subspace = sk.Subspace({"layer.experts.0.weight": [1, 3]})
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    update(opt, model, batch(), loss)
    assert opt.stats["epsilon_norm"] == pytest.approx(0.3)
    model.layer.chosen = 1
    output = model(batch()[0]).detach()
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with opt.perturbed():
        assert torch.equal(model(batch()[0]), output)


@pytest.mark.parametrize("form", ["context", "closure"])
@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_loss_of_another_model_is_refused_at_its_first_use(toy, batch, loss, subspace, ascent, form):
    model, other = toy(), toy()
    opt = sk.ShaPOOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), model, subspace, rho=0.3, ascent=ascent)
    before = bits(other)

    def closure():
        opt.zero_grad()
        value = loss(other, batch())
        value.backward()
        return value

    with refuses_in_one_line("depends on no selected neuron"):
        opt.step(closure) if form == "closure" else update(opt, other, batch(), loss)
    assert same_bits(other, before)


@pytest.mark.parametrize("way", ["grad", "by hand", "no linear layer"])
def test_frozen_weights_that_an_ascent_cannot_differentiate_are_refused(toy, batch, loss, subspace, way):
    model = toy()
    if way == "no linear layer":
        model.layers[0].down_proj = Normalised(24, 8, bias=False, dtype=F64)
        subspace = sk.Subspace({"layers.0.down_proj.weight": [1]})
    for layer in model.layers:
        layer.down_proj.weight.requires_grad_(False)
    opt = wrap(model, subspace, ascent="grad" if way == "grad" else "selective")
    with refuses_in_one_line("every selected weight is frozen"):
        if way == "by hand":
            loss(model, batch()).backward()
            opt.perturb()
        else:
            update(opt, model, batch(), loss)
    for layer in model.layers:  # frozen for a while only
        layer.down_proj.weight.requires_grad_(True)
    opt.zero_grad()
    update(opt, model, batch(), loss)
    assert opt.stats["epsilon_norm"] == pytest.approx(0.3)


def penalised(model, data):
    """With a penalty on the gradient of the output with respect to the input: the ascent differentiates twice."""
    x = data[0].clone().requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    return (output - data[1]).square().mean() + slope.square().mean()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_a_gradient_penalty_ascends_along_its_whole_gradient(batch, ascent, perturbation, axis):
    model = between(lambda: nn.Linear(8, 8))
    subspace = sk.Subspace({"layer.weight": [1, 3]}, axis=axis)
    assert_as_written_out(model, subspace, batch(), penalised, ascent=ascent, perturbation=perturbation)


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(input=x)  # by keyword
        y += x
        return F.silu(y.mul_(1.5))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_outputs_that_are_written_to_and_inputs_given_by_name_are_no_obstacle(batch, loss, ascent, perturbation, axis):
    subspace = sk.Subspace({"layer.linear.weight": [1, 3]}, axis=axis)
    assert_as_written_out(between(Inplace), subspace, batch(), loss, ascent=ascent, perturbation=perturbation)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_inputs_of_any_number_of_dimensions_are_taken(ascent, perturbation, shape):
    x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    model = between(lambda: nn.Linear(8, 8))

    def loss(model, x):
        return model(x).square().sum()

    if x.numel():
        assert_as_written_out(model, LAYER, x, loss, ascent=ascent, perturbation=perturbation)
    else:
        before = bits(model)
        update(wrap(model, LAYER, ascent=ascent, perturbation=perturbation), model, x, loss)
        assert same_bits(model, before)
