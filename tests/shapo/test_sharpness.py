"""Sharpness: first-order truth at small radii, radii of both kinds, shares of the worst case, and weights put back bit
for bit.
"""

from __future__ import annotations

import copy
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


def test_the_price_counts_the_blocks_from_the_lowest_selected_one_on(loss, tiny_llama):
    blocks = len(tiny_llama.model.layers)
    name = "model.layers.{}.mlp.down_proj.weight"
    spaces = {str(n): Subspace({name.format(n): [0], name.format(blocks - 1): [1]}) for n in range(blocks)}
    spaces["head"] = Subspace.head(tiny_llama)
    found = {curve.name: curve.price for curve in measure(loss, spaces, rhos=[1e-3], progress=False).curves}
    expected = {str(n): (3 + 2 * (blocks - n) / blocks) / 3 for n in range(blocks)}
    assert found == pytest.approx({FULL: 5 / 3, **expected, "head": 1.0})


def test_ratios_are_multiples_of_the_selected_weights_norm(result, tiny_llama):
    some = result.curves[1]
    selected = [tiny_llama.get_parameter(name).detach()[:, index] for name, index in NEURONS.items()]
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in selected))
    assert some.weight_norm == pytest.approx(norm)
    assert some.by_ratio[0].rho == pytest.approx(0.1 * norm)
    assert some.by_ratio[0].ratio == 0.1
    assert some.by_rho[1].ratio == pytest.approx(0.3 / norm)
    assert some.neurons == 5


def moves(loss, model):
    """What `loss.value` sees from now on: at each call, the distance of the weights from where they are now."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    value, seen = loss.value, []

    def watched():
        squares = ((now.detach() - before[name]).double().square().sum() for name, now in model.named_parameters())
        seen.append(math.sqrt(float(sum(squares))))
        return value()

    loss.value = watched
    return seen


def test_weights_and_gradients_are_left_as_they_were(loss, tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    weight = tiny_llama.get_parameter(next(iter(NEURONS)))
    weight.grad = torch.full_like(weight, 7.0)
    tiny_llama.train()
    seen = moves(loss, tiny_llama)
    measure(loss, {"some": Subspace(NEURONS)}, rhos=[0.5], progress=False)
    loss_increase(loss, Subspace.full(tiny_llama), 0.25)
    assert seen == pytest.approx([0, 0.5, 0.5, 0, 0.25], rel=1e-3), "nothing moved, or not as far as it should"
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    assert torch.equal(weight.grad, torch.full_like(weight, 7.0))
    assert all(parameter.grad is None for parameter in tiny_llama.parameters() if parameter is not weight)
    assert tiny_llama.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())


def test_an_exception_while_moved_puts_the_weights_back(loss, tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    seen = moves(loss, tiny_llama)
    value = loss.value

    def failing():
        found = value()
        if len(seen) == 2:
            raise StopIteration
        return found

    loss.value = failing
    with pytest.raises(StopIteration):
        loss_increase(loss, Subspace(NEURONS), 0.5)
    assert seen == pytest.approx([0, 0.5], rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


class LinearLoss:
    """mean(W x . t): its increase along its gradient is rho ||g||, at any radius."""

    bf16 = False

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (8, width), generator=generator) * 2.0 - 1
        self.model = torch.nn.Sequential(torch.nn.Linear(width, 8, bias=False))
        self.model[0].weight.data = (signs * (1 + torch.rand(8, width, generator=generator))).bfloat16()
        self.x = (torch.randint(0, 2, (1, width), generator=generator) * 2.0 - 1).bfloat16()
        self.t = torch.randn(8, generator=generator)

    def __len__(self) -> int:
        return 1

    def value(self) -> float:
        with torch.no_grad():
            return float(self.model(self.x).float() @ self.t)

    def gradient(self) -> dict[str, torch.Tensor]:
        self.model(self.x)
        return {"0.weight": self.t[:, None] * self.x.float()}


def test_an_eps_too_small_for_bfloat16_weights_is_still_measured():
    loss = LinearLoss(4096)
    norm = float(loss.gradient()["0.weight"].norm())
    weight, neurons = loss.model[0].weight.detach().clone(), Subspace({"0.weight": list(range(4096))})
    rho = norm * 2**-9 / float(loss.t.abs().max())
    moved = weight.float() + rho / norm * loss.gradient()["0.weight"]
    assert torch.equal(moved.bfloat16(), weight), "this eps is no longer one that rounding loses"
    curve = measure(loss, {"some": neurons}, rhos=[rho], progress=False).curves[1]
    assert curve.by_rho[0].increase == pytest.approx(rho * norm, rel=0.05)
    assert curve.by_rho[0].realised == pytest.approx(1, abs=1e-3)
    assert loss_increase(loss, neurons, rho) == curve.by_rho[0].increase
    assert torch.equal(loss.model[0].weight, weight)


@pytest.mark.parametrize("form", ["bfloat16 weights", "autocast"])
def test_in_bfloat16_the_increase_is_that_of_float64(form, loss, tiny_llama):
    tiny_llama.bfloat16()
    exact, model = copy.deepcopy(tiny_llama).double(), tiny_llama if form != "autocast" else tiny_llama.float()
    spaces = {"some": Subspace({name: list(range(64)) for name in NEURONS})}
    found = []
    for one, bf16 in ((exact, False), (model, form == "autocast")):
        reference = compute_logps(one, loss._data, bf16=bf16, progress=False)
        pairs = PairLoss(one, loss._data, reference, beta=1.0, bf16=bf16)
        found.append(measure(pairs, spaces, rhos=[0.05], progress=False))
    for ours, theirs in zip(found[1].curves, found[0].curves, strict=True):
        assert ours.by_rho[0].increase == pytest.approx(theirs.by_rho[0].increase, rel=0.1)
        assert ours.weight_norm == pytest.approx(theirs.weight_norm, rel=1e-6)
        assert ours.gradient_share == pytest.approx(theirs.gradient_share, rel=0.05)


def test_batches_do_not_change_the_gradient(loss, tiny_llama):
    one = PairLoss(tiny_llama, loss._data, loss._reference, batch_size=100).gradient()
    for name, value in loss.gradient().items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_radius_is_refused(radius, loss):
    with pytest.raises(UserError, match="a radius is"):
        measure(loss, {}, rhos=[radius], progress=False)


def test_a_subspace_that_does_not_fit_is_refused(loss):
    with pytest.raises(SubspaceError, match="no parameter"):
        measure(loss, {"bad": Subspace({"nowhere": [0]})}, rhos=[0.1], progress=False)


def test_the_plot_is_a_png(result, tmp_path):
    plot_sharpness(tmp_path / "sharpness.png", result, title="test")
    assert (tmp_path / "sharpness.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_measured_where_it_gives_the_logits(tied, tiny_llama, loss):
    """Against a model with a head of its own, whose weight is moved by hand."""
    tiny_llama.config.tie_word_embeddings = tied
    if tied:
        tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    apart = copy.deepcopy(tiny_llama)
    apart.lm_head.weight = torch.nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    reference = compute_logps(apart, loss._data, progress=False)
    pairs = PairLoss(apart, loss._data, reference, beta=0.1, batch_size=4)
    gradient = pairs.gradient()["lm_head.weight"]
    before, rho = pairs.value(), 0.5
    with torch.no_grad():
        apart.lm_head.weight += rho * gradient / gradient.norm()
    expected = pairs.value() - before

    kept = tiny_llama.lm_head.weight.clone()
    one = PairLoss(tiny_llama, loss._data, reference, beta=0.1, batch_size=4)
    found = measure(one, {"head": Subspace.head(tiny_llama)}, rhos=[rho], progress=False)
    assert found.curves[1].by_rho[0].increase == pytest.approx(expected, rel=1e-4)
    assert found.curves[1].gradient_share == pytest.approx(float(gradient.norm() / found.gradient_norm) ** 2, rel=1e-4)
    assert torch.equal(tiny_llama.lm_head.weight, kept)
    assert (tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight) == tied


def test_an_empty_subspace_is_refused(loss):
    with pytest.raises(SubspaceError, match="the subspace none is empty"):
        measure(loss, {"none": Subspace({})}, rhos=[0.1], progress=False)
