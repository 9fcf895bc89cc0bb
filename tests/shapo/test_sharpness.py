"""Sharpness: first-order truth at small radii, radii of both kinds, shares of the worst case, and weights put back bit
for bit.
"""

from __future__ import annotations

import math

import pytest
import torch

from shapo.data.formats import load_pairs
from shapo.errors import UserError
from shapo.plots import plot_sharpness
from shapo.scoring.logps import TokenizedPairs, compute_logps
from shapo.sharpness import FULL, PairLoss, loss_increase, measure
from shapo_kernels import Subspace, SubspaceError, losses

NEURONS = {"model.layers.0.mlp.down_proj.weight": [1, 4, 40], "model.layers.1.mlp.down_proj.weight": [0, 63]}


@pytest.fixture
def loss(tiny_llama, synthetic_rows, tiny_encoder):
    data = TokenizedPairs(load_pairs(synthetic_rows["test"][:9]), tiny_encoder)
    reference = compute_logps(tiny_llama, data, progress=False)
    return PairLoss(tiny_llama, data, reference, beta=0.1, batch_size=4)


@pytest.fixture
def result(loss):
    spaces = {"some": Subspace(NEURONS)}
    return measure(loss, spaces, rhos=[1e-3, 0.3], ratios=[0.1], progress=False)


def gradient_norm(model, data, reference, columns=None):
    """The gradient's norm by an ordinary backward pass, over all parameters or the columns of a subspace."""
    from shapo.scoring.logps import batch_logps

    policy = batch_logps(model, data.batch(range(len(data)), torch.device("cpu")))
    losses.dpo(policy.chosen, policy.rejected, reference.chosen, reference.rejected, beta=0.1).mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    chosen = grads.values() if columns is None else [grads[name][:, index] for name, index in columns.items()]
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in chosen))


def test_at_a_small_radius_the_increase_is_rho_times_the_gradients_norm(result, loss, tiny_llama):
    full, some = result.curves
    for curve, columns in ((full, None), (some, NEURONS)):
        norm = gradient_norm(tiny_llama, loss._data, loss._reference, columns)
        assert curve.by_rho[0].increase == pytest.approx(1e-3 * norm, rel=0.05)
    assert result.gradient_norm == pytest.approx(gradient_norm(tiny_llama, loss._data, loss._reference), rel=1e-4)


def test_the_loss_begins_at_log_2_against_the_model_itself(result):
    assert result.loss == pytest.approx(math.log(2), abs=1e-5)


def test_shares_are_of_the_full_space_at_the_same_radius(result):
    full, some = result.curves
    assert full.name == FULL
    assert [point.share for point in full.by_rho] == [1.0, 1.0]
    for one, other in zip(some.by_rho, full.by_rho, strict=True):
        assert one.share == pytest.approx(one.increase / other.increase)
        assert 0 < one.share < 1
    assert full.gradient_share == pytest.approx(1.0)
    assert some.by_rho[0].share == pytest.approx(math.sqrt(some.gradient_share), rel=0.05)


def test_ratios_are_multiples_of_the_selected_weights_norm(result, tiny_llama):
    some = result.curves[1]
    selected = [tiny_llama.get_parameter(name).detach()[:, index] for name, index in NEURONS.items()]
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in selected))
    assert some.weight_norm == pytest.approx(norm)
    assert some.by_ratio[0].rho == pytest.approx(0.1 * norm)
    assert some.by_rho[1].ratio == pytest.approx(0.3 / norm)
    assert some.neurons == 5


def test_weights_and_gradients_are_left_as_they_were(loss, tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    tiny_llama.train()
    measure(loss, {"some": Subspace(NEURONS)}, rhos=[10.0], progress=False)
    loss_increase(loss, Subspace.full(tiny_llama), 10.0)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert tiny_llama.training


def test_an_exception_while_moved_puts_the_weights_back(loss, tiny_llama, monkeypatch):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    values = iter([0.0])
    monkeypatch.setattr(loss, "value", lambda: next(values))
    with pytest.raises(StopIteration):
        loss_increase(loss, Subspace(NEURONS), 0.5)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_batches_do_not_change_the_gradient(loss, tiny_llama):
    one = PairLoss(tiny_llama, loss._data, loss._reference, batch_size=100).gradient()
    for name, value in loss.gradient().items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan, math.inf])
def test_a_radius_that_is_none_is_refused(radius, loss):
    with pytest.raises(UserError, match="a radius is"):
        measure(loss, {}, rhos=[radius], progress=False)


def test_a_subspace_that_does_not_fit_is_refused(loss):
    with pytest.raises(SubspaceError, match="no parameter"):
        measure(loss, {"bad": Subspace({"nowhere": [0]})}, rhos=[0.1], progress=False)


def test_the_plot_is_a_png(result, tmp_path):
    plot_sharpness(tmp_path / "sharpness.png", result, title="test")
    assert (tmp_path / "sharpness.png").read_bytes().startswith(b"\x89PNG")
