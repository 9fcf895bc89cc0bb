"""A base that trains another model, and a pass that leaves no gradient, do not go by in silence."""

import copy
import warnings

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, bits, closure_for, same_bits, update, wrap


@pytest.mark.parametrize("convert", [copy.deepcopy, lambda model: copy.deepcopy(model).float()])
def test_a_base_over_another_models_parameters_is_refused_and_leaves_no_hook(toy, batch, loss, subspace, convert):
    model = toy()
    base, other = torch.optim.AdamW(model.parameters()), convert(model)
    with pytest.raises(ValueError, match=r"has no parameter of the model.*AdamW\(model\.parameters\(\)"):
        sk.ShaPOOptimizer(base, other, subspace, rho=0.5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_float32_master_weights_of_a_16_bit_model_are_taken_with_a_warning(toy, batch, loss, subspace):
    model, data = toy().bfloat16(), batch(dtype=torch.bfloat16)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    with pytest.warns(UserWarning, match="right for float32 master weights that your loop copies"):
        opt = sk.ShaPOOptimizer(torch.optim.SGD(masters, lr=0.1), model, subspace, rho=0.5, perturbation="in_place")
    with opt.ascent():
        opt.ascend(loss(model, data))
    with opt.perturbed():
        loss(model, data).backward()
    expected = [(m - 0.1 * p.grad.float()).detach() for m, p in zip(masters, model.parameters(), strict=True)]
    for master, parameter in zip(masters, model.parameters(), strict=True):
        master.grad = parameter.grad.float()
    opt.step()
    assert opt.stats["realised_norm"] > 0
    for master, value in zip(masters, expected, strict=True):
        torch.testing.assert_close(master.detach(), value)


def test_a_base_over_one_parameter_or_none_yet_is_taken(toy, batch, loss, subspace):
    model = toy()
    late = sk.ShaPOOptimizer(torch.optim.SGD([{"params": []}], lr=0.1), model, subspace, rho=0.3)
    late.add_param_group({"params": [model.head.weight]})
    update(late, model, batch(), loss)
    late.detach()
    one = sk.ShaPOOptimizer(torch.optim.SGD([model.head.bias], lr=0.1), model, subspace, rho=0.3)
    before = model.head.bias.detach().clone()
    update(one, model, batch(), loss)
    assert not torch.equal(model.head.bias, before)


def test_a_base_over_a_prompt_in_front_of_a_frozen_model_is_taken(toy, batch, loss, subspace):
    model = toy().requires_grad_(False)
    prompt = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    opt = sk.ShaPOOptimizer(torch.optim.SGD([prompt], lr=0.1), model, subspace, rho=0.3)
    x, y = batch()
    with opt.ascent():
        opt.ascend(loss(model, (x + prompt, y)))
    with opt.perturbed():
        loss(model, (x + prompt, y)).backward()
    opt.step()
    assert prompt.abs().sum() > 0


@pytest.mark.parametrize("added", [False, True])
def test_a_replaced_weight_that_the_base_does_not_have_warns_once(toy, batch, loss, subspace, added):
    model = toy()
    opt = wrap(model, subspace)
    update(opt, model, batch(), loss)
    layer = model.layers[0].down_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    if added:
        opt.add_param_group({"params": [layer.weight]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update(opt, model, batch(1), loss)
        update(opt, model, batch(2), loss)
    assert len([w for w in caught if "perturbed but not trained" in str(w.message)]) == (0 if added else 1)


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
@pytest.mark.parametrize("without", [1, 2])
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_closure_without_backward_is_refused_in_either_pass(
    toy, batch, loss, subspace, ascent, perturbation, without, earlier
):
    model = toy()
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    for step in range(earlier):
        opt.step(closure_for(opt, model, batch(step), loss))
    before, calls = bits(model), []

    def closure():
        calls.append(opt.is_perturbed)
        opt.zero_grad()
        value = loss(model, batch())
        if len(calls) != without:
            value.backward()
        return value

    with pytest.raises(RuntimeError, match=r"left the model no gradient.*loss\.backward\(\)"):
        opt.step(closure)
    assert calls == [False, True][:without]
    assert same_bits(model, before)
    assert opt.updates == earlier
    opt.step(closure_for(opt, model, batch(), loss))
    assert opt.updates == earlier + 1
    assert opt.stats["epsilon_norm"] > 0


def test_a_descent_without_backward_is_refused_and_may_be_made_good(toy, batch, loss, subspace):
    model = toy()
    opt, before = wrap(model, subspace), bits(model)
    for _ in range(2):
        with opt.ascent():
            opt.ascend(loss(model, batch()))
        with opt.perturbed():
            loss(model, batch())
        with pytest.raises(RuntimeError, match="the descent left no gradient"):
            opt.step()
    assert same_bits(model, before)
    assert opt.updates == 0
    update(opt, model, batch(), loss)
    assert opt.updates == 1


def test_gradients_of_earlier_passes_and_hooks_that_take_them_away_are_enough(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace)
    loss(model, batch()).backward()
    with opt.ascent():
        opt.ascend(loss(model, batch(1)))
    with opt.perturbed():
        pass
    opt.step()
    opt.zero_grad()
    assert opt.updates == 1

    def take(parameter):
        taken.append(parameter.grad)
        parameter.grad = None

    taken = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    with opt.ascent():
        opt.ascend(loss(model, batch(1)))
    with opt.perturbed():
        loss(model, batch(1)).backward()
    opt.step()
    assert opt.updates == 2
    assert taken


def test_a_later_batch_that_reaches_no_selected_neuron_is_still_a_plain_update(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace)
    opt.step(closure_for(opt, model, batch(), loss))

    def closure():
        opt.zero_grad()
        value = model.head(batch()[0]).square().mean()
        value.backward()
        return value

    opt.step(closure)
    assert opt.updates == 2
