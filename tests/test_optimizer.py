"""ShaPOOptimizer: its passes and forms, and what an update leaves behind, come what may (requirements S6, S7, S18)."""

import itertools

import pytest
import torch

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, bits, same_bits, update, wrap


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_gradients_of_an_update_are_those_of_the_descent_alone(toy, batch, loss, subspace, ascent, perturbation):
    model = toy()
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    assert all(p.grad is None for p in model.parameters())
    earlier = torch.ones_like(model.head.bias)
    model.head.bias.grad = earlier.clone()
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    assert torch.equal(model.head.bias.grad, earlier)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_an_exception_in_either_pass_leaves_the_weights_as_they_were(
    toy, batch, loss, subspace, error, ascent, perturbation
):
    model = toy(torch.float32)
    data = batch(dtype=torch.float32)
    opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    before, output = bits(model), model(data[0]).detach().clone()
    with pytest.raises(error), opt.ascent():  # noqa: PT012
        opt.ascend(loss(model, data))
        raise error
    with opt.ascent():
        opt.ascend(loss(model, data))
    with pytest.raises(error), opt.perturbed():  # noqa: PT012
        assert not torch.equal(model(data[0]), output)
        raise error
    assert same_bits(model, before)
    assert torch.equal(model(data[0]), output)
    for fail_at in (1, 2):
        calls = itertools.count(1)

        def closure(calls=calls, fail_at=fail_at):
            opt.zero_grad()
            value = loss(model, data)
            value.backward()
            if next(calls) == fail_at:
                raise error
            return value

        with pytest.raises(error):
            opt.step(closure)
        assert same_bits(model, before)
        assert torch.equal(model(data[0]), output)
    assert opt.updates == 0
    opt.zero_grad()
    update(opt, model, data, loss)
    assert opt.updates == 1


def test_grad_none_in_one_pass_and_not_in_the_other_restores(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, lr=0.0)
    before = bits(model)
    loss(model, batch()).backward()
    model.layers[0].down_proj.weight.grad = None
    opt.first_step()
    opt.second_step()
    assert same_bits(model, before)
    opt.first_step()  # no gradient at all
    opt.second_step()
    assert same_bits(model, before)


def test_an_empty_subspace_is_a_plain_update(toy, batch, loss):
    ours, plain = toy(), toy()
    opt = wrap(ours, sk.Subspace({}))

    def closure():
        opt.zero_grad()
        value = loss(ours, batch())
        value.backward()
        return value

    opt.step(closure)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss(plain, batch()).backward()
    base.step()
    assert same_bits(ours, bits(plain))


@pytest.mark.parametrize(
    ("option", "values", "error"),
    [("interval", (0, -1, 1.0, True, None, "2"), ValueError), ("replay_rng", (None, 1, "False"), TypeError)],
)
def test_an_option_is_checked_when_it_is_set_as_at_construction(toy, batch, loss, subspace, option, values, error):
    opt = wrap(toy(), subspace)
    kept = getattr(opt, option)
    for value in values:
        with pytest.raises(error, match=option):
            wrap(toy(), subspace, **{option: value})
        with pytest.raises(error, match=option):
            setattr(opt, option, value)
        assert getattr(opt, option) is kept
    update(opt, opt.model, batch(), loss)
    opt.interval, opt.replay_rng = 3, True
    assert (opt.interval, opt.replay_rng, opt.due) == (3, True, False)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_an_interval_costs_exactly_its_passes(toy, batch, loss, subspace, interval):
    model = toy()
    opt = wrap(model, subspace, interval=interval)
    calls = 0
    for step in range(10):

        def closure(step=step):
            nonlocal calls
            calls += 1
            opt.zero_grad()
            value = loss(model, batch(step))
            value.backward()
            return value

        assert opt.due == ((step + 1) % interval == 0)
        opt.step(closure)
    assert calls == 10 + 10 // interval


def test_step_with_a_closure_returns_the_first_passs_loss_positional_and_keyword(toy, batch, loss, subspace):
    for keyword in (False, True):
        model = toy()
        opt = wrap(model, subspace)
        expected = loss(model, batch()).item()
        values = []

        def closure(model=model, opt=opt, values=values):
            opt.zero_grad()
            value = loss(model, batch())
            value.backward()
            values.append(value.item())
            return value

        returned = opt.step(closure=closure) if keyword else opt.step(closure)
        assert returned.item() == expected == values[0]
        assert values[1] > values[0]


def test_forgetting_the_ascent_is_an_error_that_says_what_to_do(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace)
    with pytest.raises(RuntimeError, match=r"opt\.ascent"), opt.perturbed():
        pass
    loss(model, batch()).backward()
    with pytest.raises(RuntimeError, match="pass a closure"):
        opt.step()
    with opt.ascent(), pytest.raises(RuntimeError, match="depends on no selected neuron"):
        opt.ascend((model.head.weight**2).sum())
    with pytest.raises(RuntimeError, match=r"inside `with opt.ascent"):
        opt.ascend(loss(model, batch()))
    with opt.ascent(), pytest.raises(RuntimeError, match="does not require grad"):
        opt.ascend(loss(model, batch()).detach())


def test_stepping_or_perturbing_while_perturbed_is_refused(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace)
    loss(model, batch()).backward()
    opt.perturb()
    for forbidden in (opt.step, opt.perturb, lambda: opt.load_state_dict(opt.state_dict())):
        with pytest.raises(RuntimeError, match="perturbed"):
            forbidden()
    opt.restore()


def test_an_update_that_is_not_due_is_plain_in_every_form(toy, batch, loss, subspace):
    plain = toy()
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss(plain, batch()).backward()
    base.step()
    expected = bits(plain)
    for way in ("context", "hand", "closure"):
        model = toy()
        opt = wrap(model, subspace, interval=2)
        if way == "context":
            update(opt, model, batch(), loss)
        elif way == "hand":
            loss(model, batch()).backward()
            opt.first_step()
            loss(model, batch()).backward()
            opt.second_step()
        else:

            def closure(model=model, opt=opt):
                opt.zero_grad()
                value = loss(model, batch())
                value.backward()
                return value

            opt.step(closure)
        assert same_bits(model, expected)


def test_arguments_in_another_order_are_named(toy, subspace):
    model = toy()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"model is Subspace: expected Module, in the order ShaPOOptimizer\(base"):
        sk.ShaPOOptimizer(base, subspace, model, rho=0.1)
    with pytest.raises(TypeError, match="subspace is dict: expected Subspace"):
        sk.ShaPOOptimizer(base, model, dict(subspace), rho=0.1)
