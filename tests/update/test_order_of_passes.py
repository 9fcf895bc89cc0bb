"""Passes out of order: what would train otherwise than it looks is refused in one line, and the weights stay whole."""

import copy
import re
import weakref

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, bits, refuses_in_one_line, same_bits, update, wrap


def refused(error, message, call, *args):
    with pytest.raises(error, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_an_ascent_without_a_descent_is_no_update(toy, batch, loss, subspace):
    model = toy()
    opt, before = wrap(model, subspace), bits(model)
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    loss(model, batch()).backward()  # at theta: a plain update's gradient
    refused(RuntimeError, r"inside `with opt\.perturbed\(\):`", opt.step)
    assert same_bits(model, before)
    opt.zero_grad()
    with opt.perturbed():
        loss(model, batch()).backward()
    opt.step()
    other = toy()
    update(wrap(other, subspace), other, batch(), loss)
    assert same_bits(model, bits(other))


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_an_ascent_that_is_handed_no_loss_is_refused(toy, batch, loss, subspace, ascent, perturbation):
    model = toy()
    opt, before = wrap(model, subspace, ascent=ascent, perturbation=perturbation), bits(model)
    with pytest.raises(RuntimeError, match=r"hand it over by opt\.ascend\(loss\)"), opt.ascent():
        loss(model, batch())
    assert same_bits(model, before)
    assert all(p.grad is None for p in model.parameters())
    update(opt, model, batch(), loss)


def test_a_backward_pass_inside_a_selective_ascent_is_refused(toy, batch, loss, subspace):
    # It would leave pass 1's gradients in .grad, beside those of a descent that moves nothing.
    opt = wrap(toy(), subspace)
    with pytest.raises(RuntimeError, match=r"takes the place of loss\.backward\(\)"), opt.ascent():
        loss(opt.model, batch()).backward()


@pytest.mark.parametrize("inside", ["ascent", "perturbed", "perturb", "step", "load", "copy"])
def test_inside_an_ascent_nothing_else_of_an_update_begins(toy, batch, loss, subspace, inside):
    model = toy()
    opt, before = wrap(model, subspace), bits(model)
    state = opt.state_dict()

    def forbidden():
        if inside in ("ascent", "perturbed"):
            with getattr(opt, inside)():
                pytest.fail("the block must not run")
        elif inside == "load":
            opt.load_state_dict(state)
        elif inside == "copy":
            copy.deepcopy(opt)
        else:
            getattr(opt, inside)()

    for _ in range(2):  # the second time with a direction that is left from before
        with opt.ascent():
            opt.ascend(loss(model, batch()))
            refused(RuntimeError, "inside an ascent: leave its", forbidden)
        assert same_bits(model, before)
    with opt.perturbed():
        loss(model, batch()).backward()
    opt.step()
    assert opt.updates == 1


def test_a_copy_begins_its_update_anew(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace)
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    other, copied = copy.deepcopy((model, opt))
    loss(other, batch()).backward()
    refused(RuntimeError, re.escape("this update is due and had no ascent"), copied.step)
    with opt.perturbed():
        loss(model, batch()).backward()
    opt.step()
    copied.zero_grad()
    update(copied, other, batch(), loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_forward_pass_before_the_ascent_raises_and_says_where_it_belongs(toy, batch, loss, subspace, perturbation):
    model = toy()
    opt, value = wrap(model, subspace, perturbation=perturbation), loss(model, batch())
    with refuses_in_one_line(r"run the forward pass inside `with opt\.ascent\(\):`"), opt.ascent():
        opt.ascend(value)


class Marked(torch.autograd.Function):
    """The identity, with a mark that lives as long as its place in the graph does."""

    @staticmethod
    def forward(ctx, x, marks):
        ctx.mark = nn.Identity()
        marks.add(ctx.mark)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
def test_no_micro_batch_and_no_failed_ascent_leaves_its_graph_behind(toy, batch, loss, ascent, perturbation):
    model, marks = toy(), weakref.WeakSet()
    last = sk.Subspace({"layers.1.down_proj.weight": [1]})  # a selective backward pass ends there
    opt = wrap(model, last, ascent=ascent, perturbation=perturbation)
    model.layers[0].register_forward_hook(lambda module, args, output: Marked.apply(output, marks))
    with pytest.raises(ZeroDivisionError), opt.ascent():
        loss(model, batch()) * (1 // 0)
    assert not marks
    with opt.ascent():
        waiting = loss(model, batch())
        opt.ascend(loss(model, batch()))
        assert len(marks) == 1
        opt.ascend(waiting)
        del waiting
        assert not marks


@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_a_model_that_is_converted_between_the_passes_is_named_and_trains_on(toy, batch, loss, subspace, ascent):
    model = toy(torch.float32)
    opt = wrap(model, subspace, ascent=ascent, perturbation="in_place")
    with opt.ascent():
        opt.ascend(loss(model, batch(dtype=torch.float32)))
    model.to(torch.float64)
    before = bits(model)
    changed = (
        r"down_proj\.weight' was converted or moved since the ascent: it is torch.float64.*direction torch.float32"
    )
    with refuses_in_one_line(changed), opt.perturbed():
        pass
    assert same_bits(model, before)
    update(opt, model, batch(), loss)


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_model_on_the_meta_device_is_said_to_have_moved(toy, batch, loss, subspace, perturbation):
    opt = wrap(toy(), subspace, perturbation=perturbation)
    update(opt, opt.model, batch(), loss)
    opt.model.to("meta")
    moved = "was wrapped, moved or converted after the optimizer was made.*on the meta device"
    with refuses_in_one_line(moved), opt.ascent():
        pass
