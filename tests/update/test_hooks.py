"""Hooks of others on layers with selected neurons: every way to perturb sees what the layer computes with them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as global_hooks

import shapo_kernels as sk
from tests.support.updates import COMBINATIONS, LAYER, between, refuses_in_one_line, update, wrap, written_out


def louder(output):
    return 2 * torch.tanh(output)


def shifted(input):
    return 1.5 * input + 1


HOOKS = {
    "output": lambda layer: layer.register_forward_hook(lambda m, x, y: louder(y)),
    "output, put first": lambda layer: layer.register_forward_hook(lambda m, x, y: louder(y), prepend=True),
    "output, keywords": lambda layer: layer.register_forward_hook(lambda m, x, k, y: louder(y), with_kwargs=True),
    "output, written to": lambda layer: layer.register_forward_hook(lambda m, x, y: y.mul_(2)),
    "output and input": lambda layer: layer.register_forward_hook(lambda m, x, y: louder(y) + x[0]),
    "input": lambda layer: layer.register_forward_pre_hook(lambda m, x: shifted(x[0])),
    "input, put first": lambda layer: layer.register_forward_pre_hook(lambda m, x: shifted(x[0]), prepend=True),
    "input, keywords": lambda layer: layer.register_forward_pre_hook(
        lambda m, x, k: ((), {"input": shifted(x[0])}), with_kwargs=True
    ),
    "gradient of the input": lambda layer: layer.register_full_backward_hook(lambda m, dx, dy: (dx[0] / 2,)),
    "gradient of the output": lambda layer: layer.register_full_backward_pre_hook(lambda m, dy: (dy[0] / 2,)),
    "gradient of a tensor": lambda layer: layer.register_forward_hook(lambda m, x, y: y.register_hook(louder) and None),
}


def assert_alike(model, expected):
    for mine, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_layers_hooks_are_part_of_what_is_perturbed(batch, loss, hook, ascent, perturbation, axis):
    subspace = sk.Subspace({"layer.weight": [1, 3]}, axis=axis)
    for registered_first in (True, False):
        model = between(lambda: nn.Linear(8, 8))
        expected = copy.deepcopy(model)
        HOOKS[hook](expected.layer)
        written_out(expected, subspace, batch(), loss)
        if registered_first:
            HOOKS[hook](model.layer)
        opt = wrap(model, subspace, ascent=ascent, perturbation=perturbation)
        if not registered_first:
            HOOKS[hook](model.layer)
        update(opt, model, batch(), loss)
        assert_alike(model, expected)


GLOBAL = {
    "output": lambda: global_hooks.register_module_forward_hook(lambda m, x, y: louder(y)),
    "input": lambda: global_hooks.register_module_forward_pre_hook(lambda m, x: shifted(x[0])),
    "a look": lambda: global_hooks.register_module_forward_hook(lambda m, x, y: None),
    "gradient": lambda: global_hooks.register_module_full_backward_pre_hook(lambda m, dy: (dy[0] / 2,)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("ascent", "perturbation"), COMBINATIONS)
@pytest.mark.parametrize("hook", GLOBAL)
def test_global_hooks_are_seen_too_and_refused_where_they_change_an_output_before_a_tap(
    batch, loss, hook, ascent, perturbation
):
    model = between(lambda: nn.Linear(8, 8))
    expected = copy.deepcopy(model)
    opt = wrap(model, LAYER, ascent=ascent, perturbation=perturbation)
    handle = GLOBAL[hook]()
    try:
        if hook == "output" and (ascent, perturbation) != ("grad", "in_place"):
            with refuses_in_one_line("global forward hook changed the output of a Linear"):
                update(opt, model, batch(), loss)
            assert not opt.is_perturbed
            return
        written_out(expected, LAYER, batch(), loss)
        update(opt, model, batch(), loss)
    finally:
        handle.remove()
    assert_alike(model, expected)


def test_a_global_hook_that_comes_after_others_and_after_the_first_update_is_refused_too(batch, loss):
    model = between(lambda: nn.Linear(8, 8))
    opt = wrap(model, LAYER)
    for first in (None, GLOBAL["a look"]):
        handles = [first()] if first else []
        try:
            update(opt, model, batch(), loss)
            handles.append(GLOBAL["output"]())
            with refuses_in_one_line("global forward hook changed the output of a Linear"):
                update(opt, model, batch(), loss)
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_overflows_under_a_global_hook_is_skipped_as_without_one(batch, loss, value):
    model = between(lambda: nn.Linear(8, 8))
    opt = wrap(model, LAYER)
    x, y = batch()
    x[0, 0] = value
    handle = GLOBAL["a look"]()
    try:
        update(
            opt,
            model,
            (x, y),
            lambda model, data: (model.layer(data[0])[:, :3] - data[1]).square().mean(),
            moves=False,
        )
    finally:
        handle.remove()
    assert opt.stats["skipped"] == 1


def test_taps_of_two_optimizers_stay_where_they_are(toy, batch, loss, subspace):
    model = toy()
    opts = [wrap(model, subspace, perturbation="delta") for _ in range(2)]
    layer = model.layers[0].down_proj
    before = list(layer._forward_hooks)
    for opt in opts:
        update(opt, model, batch(), loss)
    assert list(layer._forward_hooks) == before  # a compiled model would be compiled anew for another order
