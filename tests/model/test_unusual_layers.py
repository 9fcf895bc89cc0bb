"""Layers and losses that are linear in name only: perturbed as the mathematics says, or refused in one line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import shapo_kernels as sk
from tests.support.engines import Conv1D
from tests.support.updates import (
    COMBINATIONS,
    F64,
    LAYER,
    assert_as_written_out,
    between,
    bits,
    closure_for,
    refuses_in_one_line,
    same_bits,
    update,
    wrap,
)


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

    with refuses_in_one_line(r"out_proj\.weight' without calling its layer"):
        opt.step(closure_for(opt, model, batch(), loss)) if form == "closure" else update(opt, model, batch(), loss)
    assert same_bits(model, before)
    assert not opt.is_perturbed


def with_a_penalty(model, data):
    return (model(data[0]) - data[1]).square().mean() + sum(p.square().sum() for p in model.parameters()) / 10


def with_a_second_reader(model, data):
    hidden = torch.tanh(model.first(data[0]))
    return (model(data[0]) - data[1]).square().mean() + F.linear(hidden, model.layer.weight).square().mean()


@pytest.mark.parametrize("form", ["context", "closure"])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
@pytest.mark.parametrize("loss", [with_a_penalty, with_a_second_reader])
def test_a_weight_that_is_used_beside_its_layers_calls_is_refused_where_taps_would_miss_it(
    batch, loss, ascent, perturbation, form
):
    model = between(lambda: nn.Linear(8, 8))
    if (ascent, perturbation) == ("grad", "in_place"):
        assert_as_written_out(model, LAYER, batch(), loss, ascent=ascent, perturbation=perturbation)
        return
    opt, before = wrap(model, LAYER, ascent=ascent, perturbation=perturbation), bits(model)

    with refuses_in_one_line(r"'layer\.weight' beside its layer's calls .* ascent='grad' with perturbation='in_place'"):
        opt.step(closure_for(opt, model, batch(), loss)) if form == "closure" else update(opt, model, batch(), loss)
    assert same_bits(model, before)
    assert not opt.is_perturbed


class Again(nn.Module):
    """One layer, called twice in a row, on rows of sequences, and once more where nothing is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            self.linear(x.view(-1, 2, 4))
        return self.linear(torch.tanh(self.linear(x.view(-1, 2, 4)))).flatten(1)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_a_layer_that_is_called_twice_is_used_by_its_calls_alone(batch, loss, ascent, perturbation, checkpointed):
    class Twofold(Again):
        def forward(self, x):
            if not checkpointed:
                return super().forward(x)
            return checkpoint(super().forward, x, use_reentrant=False)

    subspace = sk.Subspace({"layer.linear.weight": [1, 3]})
    assert_as_written_out(between(Twofold), subspace, batch(), loss, ascent=ascent, perturbation=perturbation)


class Projected(nn.Module):
    """As GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(8, 8)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_a_gradient_penalty_through_a_conv1d_is_no_use_beside_its_calls(batch, ascent, perturbation):
    subspace = sk.Subspace({"layer.conv.weight": [1, 3]}, axis=0)
    assert_as_written_out(between(Projected), subspace, batch(), penalised, ascent=ascent, perturbation=perturbation)


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
    base = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.3, ascent=ascent)
    before = bits(other)

    with refuses_in_one_line("depends on no selected neuron"):
        opt.step(closure_for(opt, other, batch(), loss)) if form == "closure" else update(opt, other, batch(), loss)
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
        update(wrap(model, LAYER, ascent=ascent, perturbation=perturbation), model, x, loss, moves=False)
        assert same_bits(model, before)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 2)

    def forward(self, x):
        return self.conv(x.view(-1, 2, 2, 2)).flatten(1)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 2, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.lstm(x.view(-1, 4, 2))[0].flatten(1)


class Words(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8, **options)

    def forward(self, x):
        return x + self.embedding(x[:, :3].abs().mul(4).long().clamp(max=9)).sum(1)


@pytest.mark.parametrize(
    ("layer", "indices", "axis"),
    [
        (Images, {"conv.weight": [1, 3]}, 0),
        (Sequences, {"lstm.weight_ih_l0": [1, 6], "lstm.weight_hh_l1": [0]}, 0),
        (Sequences, {"lstm.weight_ih_l0": [1], "lstm.weight_hh_l1": [0]}, 1),
        (Words, {"embedding.weight": [0, 2, 9]}, 0),
        (Words, {"embedding.weight": [1, 7]}, 1),
    ],
)
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_neurons_of_layers_that_are_not_linear_are_perturbed_in_place(
    batch, loss, layer, indices, axis, ascent, perturbation
):
    model = between(layer)
    subspace = sk.Subspace({f"layer.{name}": index for name, index in indices.items()}, axis=axis)
    if perturbation == "delta":
        with pytest.raises(sk.SubspaceError, match=r"^[^\n]*perturbation='delta' cannot move it; use 'in_place'$"):
            wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    else:
        assert_as_written_out(model, subspace, batch(), loss, ascent=ascent, perturbation=perturbation)


@pytest.mark.parametrize("perturbation", ["in_place", "auto"])
def test_an_embedding_that_writes_to_its_weight_in_every_forward_pass_is_refused(perturbation):
    model = between(lambda: Words(max_norm=1.0))
    with pytest.raises(sk.SubspaceError, match=r"^'layer.embedding.weight' is written to .* \(max_norm\)[^\n]*$"):
        wrap(model, sk.Subspace({"layer.embedding.weight": [0]}, axis=0), perturbation=perturbation)


@pytest.mark.parametrize("subspace", ["some neurons", "full"])
def test_a_weight_without_a_shape_is_refused_until_its_lazy_layer_has_run(batch, loss, subspace):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LazyLinear(3)).to(F64)

    def made():
        chosen = sk.Subspace.full(model) if subspace == "full" else sk.Subspace({"2.weight": [1, 3]})
        return wrap(model, chosen)

    with pytest.raises(sk.SubspaceError, match=r"^'2.weight' has no shape yet: run a forward pass[^\n]*$"):
        made()
    model(batch()[0])
    update(made(), model, batch(), loss)
