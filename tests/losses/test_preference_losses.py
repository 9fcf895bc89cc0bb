"""Losses of single pairs, against 50-digit arithmetic and the textbook forms (L1, L2, pitfalls of published code)."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shapo_kernels import losses

mpmath.mp.dps = 50
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# q of the losses: DPO, cDPO, rDPO (above 1), soft labels down to 0.
TABLE = [1.0, 0.9, 0.6, 0.3, 0.5, 0.0, 1 - 1e-7, 1e-7, 0.9 / 0.8, 0.51 / 0.02]


def exact_loss(z, q, complement=None):
    complement = 1 - mpmath.mpf(q) if complement is None else complement
    return mpmath.log1p(mpmath.exp(-mpmath.mpf(z))) + complement * mpmath.mpf(z)


def exact_slope(z, q):
    return 1 / (1 + mpmath.exp(-mpmath.mpf(z))) - mpmath.mpf(q)


def assert_close(got, exact, floor=0.0):
    assert abs(mpmath.mpf(got) - exact) <= 1e-6 * abs(exact) + floor + SMALLEST_NORMAL


@settings(max_examples=300, deadline=None)
@given(
    z=st.floats(-1e4, 1e4, width=32),
    q=st.one_of(st.sampled_from(TABLE), st.floats(0, 1, width=32)),
    as_tensor=st.booleans(),
)
@example(z=50.0, q=1.0, as_tensor=False)
@example(z=1e4, q=1 - 1e-7, as_tensor=False)
@example(z=-1e4, q=1e-7, as_tensor=True)
@example(z=0.0, q=0.3, as_tensor=False)
@example(z=20.0, q=0.3, as_tensor=True)
def test_value_and_gradient_are_within_1e6_relative_of_the_exact_ones(z, q, as_tensor):
    margin = torch.tensor([z], requires_grad=True)
    label = torch.tensor([q]) if as_tensor else q
    q = label.item() if as_tensor else q
    loss = losses.soft_preference(margin, label)
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    assert loss.dtype == slope.dtype == torch.float32
    # Where terms of both signs add up to nearly 0, fp64 itself has an absolute error.
    one_signed = q in (0.0, 1.0)
    assert_close(loss.item(), exact_loss(z, q), floor=0.0 if 0 <= q <= 1 else 1e-15 * max(1.0, abs(z) * q))
    assert_close(slope.item(), exact_slope(z, q), floor=0.0 if one_signed else 1e-15 * max(1.0, q))


def test_gradient_does_not_vanish_where_the_log_of_a_clamped_probability_has_none():
    z = torch.tensor([17.0, 20.0, 50.0, 1000.0], requires_grad=True)
    losses.soft_preference(z, 0.3).sum().backward()
    assert torch.allclose(z.grad, torch.full((4,), 0.7))


def test_gradient_of_a_certain_label_keeps_its_digits_at_a_large_margin():
    z = torch.tensor([50.0, 80.0], requires_grad=True)
    losses.soft_preference(z, 1.0).sum().backward()
    for got, margin in zip(z.grad.tolist(), (50, 80), strict=True):
        assert_close(got, -mpmath.exp(-margin) / (1 + mpmath.exp(-margin)))


def test_gradient_at_margin_zero_is_one_half_minus_q():
    for q in TABLE:
        z = torch.zeros(1, requires_grad=True)
        losses.soft_preference(z, q).sum().backward()
        assert z.grad.item() == pytest.approx(0.5 - q, rel=1e-6)


def test_soft_preference_is_differentiable_twice_and_in_the_label():
    z = torch.tensor([-3.0, -0.5, 0.0, 0.7, 30.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.9, 0.5, 1.0, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.soft_preference, (z[[0, 1, 3, 4]], q[[0, 1, 3, 4]]))
    assert torch.autograd.gradgradcheck(losses.soft_preference, (z[[0, 1, 3, 4]], q[[0, 1, 3, 4]]))
    (slope,) = torch.autograd.grad(losses.soft_preference(z, q).sum(), q)
    assert torch.equal(slope, -z.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_widened_first_and_give_fp32(dtype):
    logps = [(100 * torch.randn(6)).to(dtype) for _ in range(4)]
    loss = losses.dpo(*logps, beta=0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, losses.dpo(*[x.float() for x in logps], beta=0.1))
    assert losses.dpo(logps[0], *[x.double() for x in logps[1:]], beta=0.1).dtype == torch.float64


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(3)
    return [(30 * torch.randn(64, generator=generator, dtype=torch.float64) - 200) for _ in range(4)]


def margins(logps):
    return (logps[0] - logps[2]) - (logps[1] - logps[3])


def test_dpo_is_minus_log_sigmoid_of_beta_h(logps):
    assert torch.allclose(losses.dpo(*logps, beta=0.1), -F.logsigmoid(0.1 * margins(logps)), rtol=1e-12)


def test_cdpo_is_the_cross_entropy_with_a_label_of_one_minus_epsilon(logps):
    z = 0.1 * margins(logps)
    expected = F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.8), reduction="none")
    assert torch.allclose(losses.cdpo(*logps, beta=0.1, epsilon=0.2), expected, rtol=1e-12)


def test_cdpo_is_least_where_the_model_believes_the_label_as_much_as_it_deserves():
    z = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    losses.cdpo(z, zero, zero, zero, beta=1.0, epsilon=0.2).sum().backward()
    assert abs(z.grad.item()) < 1e-15


def test_rdpo_is_the_unbiased_estimate_of_the_clean_loss(logps):
    """Chowdhury et al., lemma 3.1: its mean over a label that is flipped with probability epsilon is DPO's loss."""
    epsilon = 0.3
    flipped = [logps[1], logps[0], logps[3], logps[2]]
    mean = (1 - epsilon) * losses.rdpo(*logps, beta=0.1, epsilon=epsilon) + epsilon * losses.rdpo(
        *flipped, beta=0.1, epsilon=epsilon
    )
    assert torch.allclose(mean, losses.dpo(*logps, beta=0.1), rtol=1e-11)
    z = 0.1 * margins(logps)
    textbook = -((1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z)) / (1 - 2 * epsilon)
    assert torch.allclose(losses.rdpo(*logps, beta=0.1, epsilon=epsilon), textbook, rtol=1e-11)


def test_rdpo_is_unbounded_below_and_its_gradient_stays():
    z = torch.tensor([100.0, 1e4], requires_grad=True)
    zero = torch.zeros(2)
    loss = losses.rdpo(z, zero, zero, zero, beta=1.0, epsilon=0.25)
    assert torch.allclose(loss, -0.5 * z)
    loss.sum().backward()
    assert torch.allclose(z.grad, torch.full((2,), -0.5))


@pytest.mark.parametrize("loss", [losses.cdpo, losses.rdpo])
def test_without_label_noise_cdpo_and_rdpo_are_dpo(loss, logps):
    assert torch.equal(loss(*logps, beta=0.1, epsilon=0.0), losses.dpo(*logps, beta=0.1))


def test_ipo_of_sums_has_its_minimum_at_one_over_two_beta(logps):
    assert torch.allclose(losses.ipo(*logps, beta=0.1), (margins(logps) - 5.0) ** 2, rtol=1e-12)
    h, zero = torch.tensor([5.0]), torch.zeros(1)
    assert losses.ipo(h, zero, zero, zero, beta=0.1).item() == 0


def test_ipo_with_lengths_is_ipo_of_per_token_means(logps):
    lengths = [torch.randint(1, 50, (64,)) for _ in range(4)]
    expected = losses.ipo(*[x / n for x, n in zip(logps, lengths, strict=True)], beta=0.1)
    assert torch.allclose(losses.ipo(*logps, beta=0.1, lengths=lengths), expected, rtol=1e-12)


def test_the_mean_over_no_token_is_a_differentiable_zero():
    sums = torch.zeros(2, requires_grad=True)
    mean = losses.token_mean(sums, torch.tensor([0, 4]))
    mean.sum().backward()
    assert mean.tolist() == [0, 0]
    assert torch.isfinite(sums.grad).all()


def test_simpo_subtracts_gamma_itself_and_not_beta_times_gamma():
    chosen, rejected = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    expected = math.log1p(math.exp(-(2.0 * 0.5 - 0.3)))
    assert losses.simpo(chosen, rejected, beta=2.0, gamma=0.3).item() == pytest.approx(expected, rel=1e-14)


def test_hinge_is_zero_beyond_a_margin_of_one_over_beta():
    h = torch.tensor([-10.0, 0.0, 5.0, 10.0, 20.0], requires_grad=True)
    zero = torch.zeros(5)
    loss = losses.hinge(h, zero, zero, zero, beta=0.1)
    assert torch.allclose(loss, torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0]))
    loss.sum().backward()
    assert torch.allclose(h.grad, torch.tensor([-0.1, -0.1, -0.1, 0.0, 0.0]))


def reward_level(logps, chosen, rejected, **numbers):
    return losses.reward_level(*logps, reward_chosen=chosen, reward_rejected=rejected, **numbers)


def test_reward_level_is_the_soft_loss_with_the_bradley_terry_label(logps):
    chosen, rejected = torch.randn(2, 64, dtype=torch.float64)
    q = torch.sigmoid(10 * (chosen - rejected))
    expected = F.binary_cross_entropy_with_logits(0.1 * margins(logps), q, reduction="none")
    got = reward_level(logps, chosen, rejected, beta=0.1, beta_reward=10.0)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_reward_level_with_equal_rewards_asks_for_no_preference(logps):
    ones = torch.ones(64, dtype=torch.float64)
    got = reward_level(logps, ones, ones, beta=0.1, beta_reward=1.0)
    assert torch.allclose(got, losses.soft_preference(0.1 * margins(logps), 0.5), rtol=1e-12)


@pytest.mark.parametrize(("reward", "margin"), [(37.0, 1e4), (60.0, 500.0), (-60.0, -500.0), (80.0, 50.0)])
def test_reward_level_keeps_the_loss_of_a_label_that_rounds_to_one(reward, margin):
    tensors = torch.tensor([[margin], [0.0], [0.0], [0.0]], requires_grad=True)
    loss = reward_level(tensors.unbind(), torch.tensor([reward]), torch.tensor([0.0]), beta=1.0, beta_reward=1.0)
    loss.sum().backward()
    q = 1 / (1 + mpmath.exp(-mpmath.mpf(reward)))
    assert_close(loss.item(), exact_loss(margin, q, 1 - q))
    assert_close(tensors.grad[0].item(), 1 / (1 + mpmath.exp(-mpmath.mpf(margin))) - q)


def test_reward_level_gradient_reaches_the_rewards_too():
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    assert torch.autograd.gradcheck(lambda *x: reward_level(x[:4], x[4], x[5], beta=0.5, beta_reward=2.0), inputs)


def test_every_margin_loss_passes_gradcheck():
    inputs = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    lengths = [torch.tensor([3, 1, 4, 1, 5])] * 4
    for loss in (
        lambda *x: losses.dpo(*x, beta=0.3),
        lambda *x: losses.cdpo(*x, beta=0.3, epsilon=0.1),
        lambda *x: losses.rdpo(*x, beta=0.3, epsilon=0.1),
        lambda *x: losses.ipo(*x, beta=0.3, lengths=lengths),
        lambda *x: losses.hinge(*x, beta=0.3),
        lambda *x: losses.simpo(*x[:2], beta=0.3, gamma=0.5),
    ):
        assert torch.autograd.gradcheck(loss, inputs)
        assert torch.autograd.gradgradcheck(loss, inputs)


def test_nearly_equal_log_probabilities_keep_the_digits_of_their_difference():
    """In fp32 arithmetic (4000.25 - 3999.75) - (0.125 - 0.0625) and its like lose what the difference is made of."""
    chosen = torch.tensor([-4000.25, -1e6])
    rejected = torch.tensor([-3999.75, -1e6 - 0.0625])
    ref_chosen, ref_rejected = torch.tensor([1e-6, -1e-6]), torch.tensor([-2e-6, 3e-6])
    h = (chosen.double() - rejected.double()) - (ref_chosen.double() - ref_rejected.double())
    for got, z in zip(losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=1.0).tolist(), h, strict=True):
        assert_close(got, exact_loss(z.item(), 1.0))


def test_an_empty_batch_of_pairs_has_no_losses():
    assert losses.dpo(*[torch.zeros(0)] * 4, beta=0.1).shape == (0,)


ONES = [torch.ones(3)] * 4


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_must_be_finite_and_above_zero(beta):
    for loss in (losses.dpo, losses.ipo, losses.hinge):
        with pytest.raises(ValueError, match=r"beta is .*above 0"):
            loss(*ONES, beta=beta)
    with pytest.raises(ValueError, match="beta_reward is"):
        reward_level(ONES, ONES[0], ONES[0], beta=0.1, beta_reward=beta)


@pytest.mark.parametrize("epsilon", [-0.01, 0.5, 0.7, math.nan])
def test_flip_rates_of_one_half_and_more_are_refused(epsilon):
    for loss in (losses.cdpo, losses.rdpo):
        with pytest.raises(ValueError, match=r"epsilon is .*\[0, 0.5\)"):
            loss(*ONES, beta=0.1, epsilon=epsilon)


@pytest.mark.parametrize("beta", [torch.tensor(0.1), "0.1", None, True])
def test_parameters_must_be_numbers(beta):
    with pytest.raises(TypeError, match=r"beta is a .*expected a Python number"):
        losses.dpo(*ONES, beta=beta)


def test_integer_tensors_are_refused():
    with pytest.raises(TypeError, match=r"ref_chosen is torch.int64"):
        losses.dpo(ONES[0], ONES[0], torch.ones(3, dtype=torch.int64), ONES[0], beta=0.1)
    with pytest.raises(TypeError, match=r"q is torch.int64"):
        losses.soft_preference(ONES[0], torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="policy_chosen is a list"):
        losses.dpo([1.0], ONES[0], ONES[0], ONES[0], beta=0.1)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="policy_rejected has 1 pairs and policy_chosen has 3"):
        losses.dpo(ONES[0], torch.ones(1), ONES[0], ONES[0], beta=0.1)
    with pytest.raises(ValueError, match=r"policy_chosen has shape \[3, 1\]"):
        losses.dpo(*[torch.ones(3, 1)] * 4, beta=0.1)
    with pytest.raises(ValueError, match="q has 2 pairs"):
        losses.soft_preference(ONES[0], torch.ones(2))
    with pytest.raises(ValueError, match="reward_chosen has 2 pairs"):
        reward_level(ONES, torch.ones(2), torch.ones(2), beta=0.1, beta_reward=1.0)
    with pytest.raises(ValueError, match="lengths must be four tensors"):
        losses.ipo(*ONES, beta=0.1, lengths=[torch.ones(3)] * 2)
    with pytest.raises(ValueError, match=r"token counts are \[1\]: expected \[3\]"):
        losses.ipo(*ONES, beta=0.1, lengths=[torch.ones(1)] * 4)


def test_devices_must_agree():
    with pytest.raises(ValueError, match="ref_chosen is on meta and policy_chosen on cpu"):
        losses.dpo(ONES[0], ONES[0], torch.ones(3, device="meta"), ONES[0], beta=0.1)


def test_a_label_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="q is nan"):
        losses.soft_preference(ONES[0], math.nan)


INF = math.inf
# Margins z = +inf and -inf: the limits of each loss, and of its derivative with respect to the margin.
LIMITS = {
    "dpo": (lambda z: losses.dpo(z, ZERO, ZERO, ZERO, beta=1.0), (0.0, INF), (0.0, -1.0)),
    "simpo": (lambda z: losses.simpo(z, ZERO, beta=1.0, gamma=0.5), (0.0, INF), (0.0, -1.0)),
    "cdpo": (lambda z: losses.cdpo(z, ZERO, ZERO, ZERO, beta=1.0, epsilon=0.25), (INF, INF), (0.25, -0.75)),
    "cdpo of 0": (lambda z: losses.cdpo(z, ZERO, ZERO, ZERO, beta=1.0, epsilon=0.0), (0.0, INF), (0.0, -1.0)),
    "rdpo": (lambda z: losses.rdpo(z, ZERO, ZERO, ZERO, beta=1.0, epsilon=0.25), (-INF, INF), (-0.5, -1.5)),
    "hinge": (lambda z: losses.hinge(z, ZERO, ZERO, ZERO, beta=1.0), (0.0, INF), (0.0, -1.0)),
    "ipo": (lambda z: losses.ipo(z, ZERO, ZERO, ZERO, beta=1.0), (INF, INF), (INF, -INF)),
    "certain rewards": (lambda z: of_rewards(z, 1e4), (0.0, INF), (0.0, -1.0)),
    "rewards against": (lambda z: of_rewards(z, -1e4), (INF, 0.0), (1.0, 0.0)),
    "q of 0": (lambda z: losses.soft_preference(z, 0.0), (INF, 0.0), (1.0, 0.0)),
    "q of 1": (lambda z: losses.soft_preference(z, torch.ones(1)), (0.0, INF), (0.0, -1.0)),
}
ZERO = torch.zeros(1)


def of_rewards(z, reward):
    reward = torch.tensor([reward])
    return losses.reward_level(
        z, ZERO, ZERO, ZERO, beta=1.0, reward_chosen=reward, reward_rejected=ZERO, beta_reward=1.0
    )


@pytest.mark.parametrize("name", LIMITS)
def test_an_infinite_margin_gives_the_limit_of_the_loss_and_of_its_gradient(name):
    loss, values, slopes = LIMITS[name]
    for z, value, slope in zip((INF, -INF), values, slopes, strict=True):
        margin = torch.tensor([z], requires_grad=True)
        found = loss(margin)
        assert found.item() == value
        assert torch.autograd.grad(found, margin)[0].item() == slope
