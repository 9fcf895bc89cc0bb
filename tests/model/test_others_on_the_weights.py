"""What others do to the weights while they are perturbed, or while an ascent looks at them: right, or refused."""

import copy
import io
import warnings

import pytest
import torch

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, bits, refuses_in_one_line, same_bits, update, wrap

PERTURBATIONS = ["in_place", "delta"]


def ascended(model, subspace, data, loss, **options):
    opt = wrap(model, subspace, **options)
    with opt.ascent():
        opt.ascend(loss(model, data))
    return opt


def step_in_backward(model):
    """Gradient descent that is taken as soon as each gradient is there, as memory-saving trainers do."""

    def write(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(write)


@pytest.mark.parametrize("way", ["deepcopy", "deepcopy of a layer", "torch.save"])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_copy_of_a_perturbed_model_is_clean_or_refused(toy, batch, loss, subspace, perturbation, way):
    model = toy()
    before = bits(model)

    def copied():
        if way != "torch.save":
            return copy.deepcopy(model if way == "deepcopy" else model.layers)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    opt = ascended(model, subspace, batch(), loss, perturbation=perturbation)
    with opt.perturbed():
        if perturbation == "in_place":
            with refuses_in_one_line("copy or save it outside"):
                copied()
        else:
            assert same_bits(copied(), before[: len(bits(copied()))])
    assert same_bits(copied(), before[: len(bits(copied()))])


@pytest.mark.parametrize("by", ["the base's step", "load_state_dict", "a backward hook"])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_what_others_write_in_a_descent_stays_or_is_refused(toy, batch, loss, subspace, perturbation, by):
    model, expected = toy(), toy()
    other = wrap(expected, subspace, perturbation=perturbation)
    update(other, expected, batch(), loss)
    if by == "load_state_dict":
        expected = toy(seed=1)
    opt = ascended(model, subspace, batch(), loss, perturbation=perturbation)
    if by == "a backward hook":
        step_in_backward(model)

    def descend():
        with opt.perturbed():
            loss(model, batch()).backward()
            if by == "the base's step":
                opt.base.step()
            elif by == "load_state_dict":
                model.load_state_dict(expected.state_dict())

    if perturbation == "delta":
        descend()
        for mine, wanted in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)
    else:
        before = {n: model.get_parameter(n)[:, i].clone() for n, i in subspace.items()}
        with refuses_in_one_line("was written to while it was perturbed in place"):
            descend()
        assert all(torch.equal(model.get_parameter(n)[:, i], before[n]) for n, i in subspace.items())
        assert not opt.is_perturbed


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_write_that_autograd_does_not_count_is_lost_on_neurons_that_are_written_back_and_stays_on_others(
    toy, batch, loss, subspace, perturbation
):
    model = toy()
    before = {name: model.get_parameter(name).detach().clone() for name in subspace}
    with ascended(model, subspace, batch(), loss, perturbation=perturbation).perturbed():
        for name in subspace:
            model.get_parameter(name).data.fill_(7.0)
    for name, index in subspace.items():
        expected = torch.full_like(before[name], 7.0)
        if perturbation == "in_place":
            expected[:, index] = before[name][:, index]
        assert torch.equal(model.get_parameter(name), expected)


def test_an_exception_of_a_descent_is_not_hidden_by_that_refusal(toy, batch, loss, subspace):
    opt = ascended(toy(), subspace, batch(), loss)
    with pytest.raises(ZeroDivisionError), opt.perturbed():  # noqa: PT012
        with torch.no_grad():
            opt.model.layers[0].down_proj.weight.mul_(2)
        raise ZeroDivisionError


@pytest.mark.parametrize("form", ["ascent='grad'", "closure"])
def test_a_step_in_the_ascents_own_backward_pass_is_refused(toy, batch, loss, subspace, form):
    model = toy()
    opt = wrap(model, subspace, ascent="grad" if form != "closure" else "selective")

    step_in_backward(model)

    def closure():
        value = loss(model, batch())
        value.backward()
        return value

    with refuses_in_one_line("was written to during the ascent"):
        if form == "closure":
            opt.step(closure)
        else:
            with opt.ascent():
                opt.ascend(loss(model, batch()))


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("ignore:the descent computed")
def test_a_model_that_goes_to_bfloat16_in_an_update_is_its_own_weights_in_bfloat16(
    toy, batch, loss, subspace, ascent, perturbation, inside
):
    model = toy(torch.float32)
    expected = [p.detach().bfloat16() for p in model.parameters()]
    data = batch(dtype=torch.float32)
    opt = ascended(model, subspace, data, loss, ascent=ascent, perturbation=perturbation)
    if not inside:
        model.bfloat16()
    with opt.perturbed():
        model.bfloat16()
        loss(model, batch(dtype=torch.bfloat16)).backward()
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    opt.step()
    opt.zero_grad()
    update(opt, model, batch(dtype=torch.bfloat16), loss)
    assert opt.stats["epsilon_norm"] == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_two_optimizers_that_perturb_one_weight_at_once_add_up_or_are_refused(toy, batch, loss, subspace, perturbation):
    model = toy()
    before, output = bits(model), model(batch()[0]).detach()
    one = ascended(model, subspace, batch(), loss, perturbation=perturbation)
    two = ascended(model, sk.Subspace({"layers.0.down_proj.weight": [1, 2]}), batch(), loss, perturbation=perturbation)
    one.perturb()
    if perturbation == "in_place":
        with refuses_in_one_line("is perturbed in place by another optimizer"):
            two.perturb()
        assert not two.is_perturbed
        one.restore()
    else:
        two.perturb()
        both = model(batch()[0]).detach()
        one.restore()  # in whatever order
        only_two = model(batch()[0]).detach()
        assert not torch.allclose(both, only_two)
        two.restore()
    assert same_bits(model, before)
    assert torch.equal(model(batch()[0]), output)
    two = ascended(model, subspace, batch(), loss, perturbation=perturbation)
    two.perturb()  # and one after the other they may
    two.restore()
    assert same_bits(model, before)


def test_a_layer_that_is_called_with_other_weights_is_refused_where_they_are_written_to(toy, batch, loss, subspace):
    model, x = toy(), batch()[0]
    own, others = dict(model.named_parameters()), {n: p.detach().clone() for n, p in model.named_parameters()}
    detached = {n: p.detach() for n, p in own.items()}
    opt = ascended(model, subspace, batch(), loss, perturbation="in_place")
    with opt.perturbed():
        moved = model(x)
        for weights in (own, detached):
            assert torch.equal(torch.func.functional_call(model, weights, (x,)), moved)
        slopes = torch.func.grad(lambda p: loss(lambda x: torch.func.functional_call(model, p, (x,)), batch()))(own)
        expected = torch.autograd.grad(loss(model, batch()), list(own.values()))
        for slope, gradient in zip(slopes.values(), expected, strict=True):
            torch.testing.assert_close(slope, gradient, rtol=1e-12, atol=1e-14)
        with refuses_in_one_line("called with another weight"):
            torch.func.functional_call(model, others, (x,))
    opt = ascended(toy(), subspace, batch(), loss, perturbation="delta")
    with opt.perturbed():
        torch.testing.assert_close(torch.func.functional_call(opt.model, others, (x,)), moved, rtol=1e-12, atol=1e-14)


def test_two_parameters_in_the_same_memory_are_refused_where_they_would_be_written_to_twice(toy, batch, loss):
    def shared():
        model = toy()
        model.layers[1].down_proj.weight = torch.nn.Parameter(model.layers[0].down_proj.weight.data)
        return model

    subspace = sk.Subspace({f"layers.{i}.down_proj.weight": [1, 5] for i in range(2)})
    with pytest.raises(sk.SubspaceError, match="two parameters in the same memory"):
        wrap(shared(), subspace)
    model = shared()
    before = bits(model)
    update(wrap(model, subspace, perturbation="delta", lr=0.0), model, batch(), loss)
    assert same_bits(model, before)


def test_weights_without_memory_are_refused(toy, subspace):
    with pytest.raises(sk.SubspaceError, match="on the meta device"):
        wrap(toy().to("meta"), subspace)


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_an_inference_mode_around_some_of_it_leaves_nothing_behind(toy, batch, loss, subspace, ascent, perturbation):
    model, twin = toy(), toy()
    with torch.inference_mode():
        opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
    other = wrap(twin, subspace, ascent=ascent, perturbation=perturbation)
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with torch.inference_mode(), opt.perturbed():
        assert not torch.equal(model(batch()[0]), twin(batch()[0]))
    loss(model, batch()).backward()
    with torch.inference_mode():
        opt.perturb()
    loss(model, batch()).backward()
    opt.restore()
    opt.step()
    update(other, twin, batch(), loss)
    opt.zero_grad()
    for step in (1, 2):
        update(opt, model, batch(step), loss)
        update(other, twin, batch(step), loss)
    for mine, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_an_autocast_around_the_descent_alone_is_warned_of_once_where_it_rounds_eps(
    toy, batch, loss, subspace, perturbation
):
    model, data = toy(torch.float32), batch(dtype=torch.float32)
    opt = wrap(model, subspace, perturbation=perturbation)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with opt.ascent():
                opt.ascend(loss(model, data))
            with opt.perturbed(), torch.autocast("cpu", torch.bfloat16):
                loss(model, data).backward()
            opt.step()
            opt.zero_grad()
        update(opt, model, data, loss)
    expected = ["the descent computed 'layers.0.down_proj.weight' in torch.bfloat16 and the ascent in torch.float32"]
    assert [str(w.message).split(",")[0] for w in caught] == (expected if perturbation == "in_place" else [])


@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_detached_optimizer_updates_no_more(toy, batch, loss, subspace, ascent):
    model = toy()
    opt = wrap(model, subspace, ascent=ascent, perturbation="delta")
    opt.detach()
    with refuses_in_one_line("detached from its model"):
        update(opt, model, batch(), loss)
    loss(model, batch()).backward()
    with refuses_in_one_line("detached from its model"):
        opt.perturb()
