"""The radius: over the selected gradient alone, by group, scheduled, drawn, and which way (requirements S4, S16)."""

import pytest
import torch

import shapo_kernels as sk
from tests.support.updates import bits, same_bits, update, wrap


def test_the_norm_of_epsilon_is_rho_over_the_selected_gradient_only(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.25)
    update(opt, model, batch(), loss)
    stats = opt.stats
    assert stats["epsilon_norm"] == pytest.approx(0.25, rel=1e-9)
    assert stats["realised_norm"] == pytest.approx(0.25, rel=1e-9)
    assert stats["realised_cosine"] == pytest.approx(1.0, rel=1e-12)


def test_groups_carry_their_own_rho_and_zero_perturbs_nothing(toy, batch, loss, subspace):
    model = toy()
    first, second = model.layers[0].parameters(), model.layers[1].parameters()
    base = torch.optim.SGD(
        [{"params": first, "rho": 0.0}, {"params": second}, {"params": model.head.parameters()}], lr=0.1
    )
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.3)
    before = [layer.down_proj.weight.detach().clone() for layer in model.layers]
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with opt.perturbed():
        assert torch.equal(model.layers[0].down_proj.weight, before[0])
        assert not torch.equal(model.layers[1].down_proj.weight, before[1])
    base.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match=r"rho is -1.0"):
        _ = opt.due


def test_a_radius_may_be_scheduled_from_a_plain_warm_start(toy, batch, loss, subspace):
    model = toy()
    opt = wrap(model, subspace, rho=0.0)
    dues = []
    for step in range(4):
        opt.rho = 0.0 if step < 2 else 0.1 * step
        dues.append(opt.due)
        update(opt, model, batch(step), loss)
    assert dues == [False, False, True, True]
    assert opt.stats["epsilon_norm"] == pytest.approx(0.3)


def test_raw_factors_are_drawn_from_their_range_and_resume(toy, batch, loss, subspace):
    def norms(opt, model, steps):
        found = []
        for step in steps:
            update(opt, model, batch(step), loss)
            found.append(opt.stats["epsilon_norm"] / opt.stats["grad_norm"])
        return found

    model = toy()
    opt = wrap(model, subspace, rho=(0.2, 0.4), norm="none")
    first = norms(opt, model, range(3))
    assert all(0.2 <= factor <= 0.4 for factor in first)
    assert len(set(first)) == 3
    again = wrap(toy(), subspace, rho=(0.2, 0.4), norm="none")
    again.load_state_dict(opt.state_dict())
    assert norms(again, again.model, range(3, 6)) == pytest.approx(norms(opt, model, range(3, 6)), rel=1e-9)


def test_maximize_moves_the_weights_up(toy, batch, loss, subspace):
    model = toy()
    opt = sk.ShaPOOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, maximize=True), model, subspace, rho=0.01)
    start = loss(model, batch()).item()
    for _ in range(3):
        update(opt, model, batch(), loss)
    assert loss(model, batch()).item() > start


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"norm": "none"}, {"relative": True}])
def test_maximising_a_loss_is_minimising_its_negative_bit_for_bit(toy, batch, loss, subspace, options, perturbation):
    # What is worst for a loss that is to grow lies down its gradient.
    models = []
    for sign in (1, -1):
        model = toy()
        base = torch.optim.AdamW(model.parameters(), lr=0.01, maximize=sign > 0)
        opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.3, perturbation=perturbation, **options)
        for step in range(3):
            update(opt, model, batch(step), lambda m, data, sign=sign: sign * loss(m, data))
        assert opt.stats["epsilon_norm"] > 0
        models.append(model)
    assert same_bits(models[0], bits(models[1]))


def test_a_group_that_maximises_is_perturbed_down_the_gradient_and_the_others_up(toy, batch, loss, subspace):
    model = toy()
    layers = [list(layer.parameters()) for layer in model.layers]
    base = torch.optim.SGD([{"params": layers[0], "maximize": True}, {"params": layers[1]}], lr=0.1)
    opt = sk.ShaPOOptimizer(base, model, subspace, rho=0.3)
    weights = [layer.down_proj.weight for layer in model.layers]
    grads = torch.autograd.grad(loss(model, batch()), weights)
    before = [w.detach().clone() for w in weights]
    with opt.ascent():
        opt.ascend(loss(model, batch()))
    with opt.perturbed():
        along = [((w.detach() - b) * g).sum().item() for w, b, g in zip(weights, before, grads, strict=True)]
    assert along[0] < 0 < along[1]
