"""Stochastic rounding: neighbours only, right on average, the same draws again; small perturbations survive it."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from shapo_kernels import ops
from shapo_kernels.reference.rounding import round_stochastically
from tests.support.updates import bits, same_bits, update, wrap

HALVES = [torch.bfloat16, torch.float16]


def neighbours(x, dtype):
    """The numbers of `dtype` around each x: by torch.nextafter from the nearest one."""
    near = x.to(dtype)
    up = torch.nextafter(near, torch.full_like(near, math.inf))
    down = torch.nextafter(near, torch.full_like(near, -math.inf))
    low = torch.where(near.double() > x.double(), down, near)
    high = torch.where(near.double() < x.double(), up, near)
    return low.double(), high.double()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 6e-5, 1e-7])  # down to float16's subnormal numbers
def test_a_number_goes_to_one_of_its_neighbours_with_the_probability_that_keeps_its_mean(dtype, size):
    torch.manual_seed(0)
    x = torch.randn(64) * size
    low, high = neighbours(x, dtype)
    draws = torch.stack([round_stochastically(x, dtype, key=key).double() for key in range(4000)])
    assert ((draws == low) | (draws == high)).all()
    inside = high > low
    probability = ((x.double() - low) / (high - low))[inside]
    share = (draws == high).double().mean(0)[inside]
    # Five standard deviations of a mean of 4000 draws.
    assert ((share - probability).abs() <= 5 * (probability * (1 - probability) / 4000).sqrt() + 1e-12).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_representable_too_large_or_not_finite_is_rounded_as_ever(dtype):
    largest = torch.finfo(dtype).max
    exact = torch.tensor([0.0, -0.0, 1.0, -0.5, largest, -largest], dtype=torch.float32)
    special = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float32)
    for key in range(20):
        assert torch.equal(round_stochastically(exact, dtype, key=key), exact.to(dtype))
        got = round_stochastically(special, dtype, key=key)
        assert torch.equal(got.isnan(), special.isnan())
        assert torch.equal(got[:2], special[:2].to(dtype))


def test_draws_of_elements_layers_and_perturbations_are_uniform_and_uncorrelated():
    x = torch.full((20_000,), 1.0 + 2.0**-8)  # half-way between two bfloat16 numbers
    ups = torch.stack(
        [(round_stochastically(x, torch.bfloat16, key=key) > 1).double() for key in (0, 1, 2, 12345, 2**31 + 7)]
    )
    assert (ups.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(x.numel())
    centred = ups - 0.5
    products = centred @ centred.t() / (0.25 * x.numel())
    assert (products - torch.eye(5)).abs().max() < 5 / math.sqrt(x.numel())
    neighbouring = (centred[:, 1:] * centred[:, :-1]).mean(1) / 0.25
    assert neighbouring.abs().max() < 5 / math.sqrt(x.numel())


def layers(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(6, 10).mul(0.02).to(dtype), torch.randn(8, 4).mul(0.02).to(dtype)]
    indices, axes = [torch.tensor([1, 4, 7]), torch.tensor([0, 5])], [1, 0]
    directions = [torch.randn(6, 3), torch.randn(2, 4)]
    return weights, indices, axes, directions, torch.tensor([1e-5, 2e-5], dtype=torch.float64)


@pytest.mark.parametrize("dtype", HALVES)
def test_only_selected_neurons_are_written_and_their_sums_are_what_reached_them(dtype):
    weights, indices, axes, directions, scale = layers(dtype)
    before = [w.clone() for w in weights]
    backups = [torch.empty_like(d, dtype=dtype) for d in directions]
    sums = ops.perturb_(weights, indices, axes, directions, scale, backups, rounding_key=3)
    for w, b, i, a, d, s, row, backup in zip(
        weights, before, indices, axes, directions, scale, sums, backups, strict=True
    ):
        others = torch.ones(w.shape[a], dtype=torch.bool)
        others[i] = False
        assert torch.equal(w.index_select(a, others.nonzero()[:, 0]), b.index_select(a, others.nonzero()[:, 0]))
        assert torch.equal(backup, b.index_select(a, i))
        moved = w.index_select(a, i).double() - backup.double()
        torch.testing.assert_close(row[0], moved.square().sum())
        torch.testing.assert_close(row[1], (moved * d.double() * s).sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(row[2], backup.double().square().sum())


def test_a_layer_with_scale_zero_stays_as_it_is_whatever_its_direction_holds():
    weights, indices, axes, directions, _ = layers(torch.bfloat16)
    directions[0].fill_(math.nan)
    weights[0][1, 4] = math.inf  # a difference to itself is NaN
    before = weights[0].clone()
    backups = [torch.empty_like(d, dtype=torch.bfloat16) for d in directions]
    scale = torch.tensor([0.0, 1e-5], dtype=torch.float64)
    sums = ops.perturb_(weights, indices, axes, directions, scale, backups, rounding_key=0)
    assert torch.equal(weights[0], before)
    assert torch.equal(backups[0], before.index_select(1, indices[0]))
    assert sums[0, :2].tolist() == [0, 0]
    assert sums[0, 2] == math.inf


def test_every_backend_draws_the_same_and_a_key_of_none_rounds_to_nearest():
    found = {}
    for name in sk.backends.available():
        with sk.backends.use(name):
            for key in (None, 5, 6):
                weights, indices, axes, directions, scale = layers(torch.bfloat16)
                backups = [torch.empty_like(d, dtype=torch.bfloat16) for d in directions]
                ops.perturb_(weights, indices, axes, directions, 100 * scale, backups, rounding_key=key)
                found.setdefault(key, []).append(torch.cat([w.flatten() for w in weights]))
    assert all(torch.equal(one, ones[0]) for ones in found.values() for one in ones)
    weights, indices, axes, directions, scale = layers(torch.bfloat16)
    for w, i, a, d, s in zip(weights, indices, axes, directions, 100 * scale, strict=True):
        w.index_copy_(a, i, (w.index_select(a, i).float() + s.float() * d).bfloat16())
    assert torch.equal(found[None][0], torch.cat([w.flatten() for w in weights]))
    assert not torch.equal(found[5][0], found[6][0])


def test_what_does_not_fit_is_refused_with_a_rounding_key_too():
    weights, indices, axes, directions, scale = layers(torch.bfloat16)
    backups = [torch.empty_like(d, dtype=torch.bfloat16) for d in directions]
    with pytest.raises(TypeError, match=r"scale is torch\.float32"):
        ops.perturb_(weights, indices, axes, directions, scale.float(), backups, rounding_key=1)
    with pytest.raises(TypeError, match=r"backups\[0\] is torch.float32"):
        ops.perturb_(weights, indices, axes, directions, scale, [b.float() for b in backups], rounding_key=1)


def build(toy, subspace, **options):
    model = toy(torch.bfloat16)
    options = {"perturbation": "in_place", "stochastic_rounding": True, "rho": 2e-3, **options}
    return model, wrap(model, subspace, **options)


@pytest.mark.filterwarnings("ignore:the perturbation is lost")
def test_weights_come_back_bit_for_bit_and_each_perturbation_draws_anew(toy, batch, loss, subspace):
    model, opt = build(toy, subspace, lr=0.0)
    before = bits(model)
    seen = []
    for _ in range(2):
        with opt.ascent():
            opt.ascend(loss(model, batch(dtype=torch.bfloat16)))
        with opt.perturbed():
            seen.append(bits(model))
            with opt.unperturbed():
                assert same_bits(model, before)
            assert same_bits(model, seen[-1])
        assert same_bits(model, before)
        opt.step()
    assert not all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.filterwarnings("ignore:the perturbation is lost")
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(toy, batch, loss, subspace, stop):
    model, opt = build(toy, subspace, interval=2, seed=7)
    for step in range(stop):
        _update(opt, model, batch(step, torch.bfloat16), loss)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    copied = copy.deepcopy(opt)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = build(toy, subspace, interval=2, seed=7)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    for m, o in ((model, opt), (other, resumed), (copied.model, copied)):
        for step in range(stop, 6):
            _update(o, m, batch(step, torch.bfloat16), loss)
    assert same_bits(other, bits(model))
    assert same_bits(copied.model, bits(model))


def _update(opt, model, data, loss):
    if opt.due:
        update(opt, model, data, loss)
    else:
        loss(model, data).backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.filterwarnings("ignore:the perturbation is lost")
def test_an_epsilon_below_the_weights_spacing_arrives_on_average():
    # Elements of eps are 1.9e-5 beside weights near 0.02, whose spacing is 1.2e-4.
    torch.manual_seed(0)
    linear = nn.Linear(100, 1000, bias=False).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(torch.randn(1000, 100) * 0.02)
    subspace = sk.Subspace({"weight": range(99)})
    x = torch.randn(64, 100).bfloat16()
    share = {}
    for stochastic in (False, True):
        opt = sk.ShaPOOptimizer(
            torch.optim.SGD(linear.parameters(), lr=0.0),
            linear,
            subspace,
            rho=1.9e-5 * math.sqrt(99_000),
            perturbation="in_place",
            stochastic_rounding=stochastic,
        )
        shares = []
        for _ in range(5):
            with opt.ascent():
                opt.ascend(linear(x).float().square().mean())
            with opt.perturbed():
                pass
            opt.step()
            stats = opt.stats
            shares.append(stats["realised_cosine"] * stats["realised_norm"] / stats["epsilon_norm"])
        opt.detach()
        share[stochastic] = sum(shares) / 5
    assert share[True] == pytest.approx(1.0, abs=0.03)
    assert share[False] < 0.7


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"perturbation": "delta"}, torch.bfloat16, "only 'in_place' rounds weights"),
        ({"perturbation": "auto"}, torch.bfloat16, "only 'in_place' rounds weights"),
        ({"perturbation": "in_place"}, torch.float32, "no selected weight is bfloat16 or float16"),
    ],
)
def test_where_nothing_is_rounded_it_is_refused(toy, subspace, options, dtype, message):
    model = toy(dtype)
    with pytest.raises(ValueError, match=message):
        wrap(model, subspace, stochastic_rounding=True, **options)
    assert not any(m._forward_hooks for m in model.modules())
