"""Any numbers to any public loss: the value and slope of float64 mathematics, or a refusal that leaves all as it was.

As `tests/ops/test_any_input.py`: views, expanded and overlapping memory, no pair at all, infinities, NaN, devices.
"""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shapo_kernels import losses
from tests.support.draws import DTYPES, F64, INF, Draw, assert_near, fuzzed, outcome, sizes

softplus = torch.nn.functional.softplus
BETA, EPSILON = 0.3, 0.1


def share(weight, value):
    """weight * value, where nothing of infinity is nothing."""
    weight = torch.as_tensor(weight, dtype=F64)
    return torch.where(weight == 0, 0.0, weight * value).where((weight != 0) | ~value.isnan(), value)


def labelled(z, q, other):
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z)."""
    return share(q, softplus(-z)) + share(other, softplus(z))


def robust(z):
    return ((1 - EPSILON) * softplus(-z) - EPSILON * softplus(z)) / (1 - 2 * EPSILON)


# Tensors of a pair, further arguments, and the textbook form in h, the margin of the first four (simpo: two).
PAIRS = {
    "dpo": (4, {"beta": BETA}, lambda h: softplus(-BETA * h)),
    "cdpo": (4, {"beta": BETA, "epsilon": EPSILON}, lambda h: labelled(BETA * h, 1 - EPSILON, EPSILON)),
    "rdpo": (4, {"beta": BETA, "epsilon": EPSILON}, lambda h: robust(BETA * h)),
    "hinge": (4, {"beta": BETA}, lambda h: torch.relu(1 - BETA * h)),
    "ipo": (4, {"beta": 0.5}, lambda h: (h - 1) ** 2),
    "simpo": (2, {"beta": BETA, "gamma": 0.5}, lambda h: softplus(0.5 - BETA * h)),
}


def logps_of(draw, count, pairs):
    """`count` tensors of log-probabilities, once in a while of unequal length or on two devices; do they fit?"""
    dtype, special = draw.one(*DTYPES), draw.one(False, True)
    found = [draw.tensor(pairs + draw.one(*[0] * 30, 1), dtype=dtype, special=special) for _ in range(count)]
    fits = len({len(x) for x in found}) == 1
    found = draw.elsewhere(*found)
    return found, fits and not any(x.is_meta for x in found)


def margin(logps):
    h = logps[0].double() - logps[1].double()
    return h if len(logps) < 4 else h - (logps[2].double() - logps[3].double())


def assert_slopes(call, textbook, inputs):
    """The gradient of the first input, where all numbers of a pair are finite."""
    finite = torch.stack([x.isfinite() for x in inputs]).all(0)
    first = inputs[0].detach().requires_grad_()
    wide = [x.double()[finite] for x in inputs]
    wide[0].requires_grad_()
    (got,) = torch.autograd.grad(call(first, *inputs[1:]).double()[finite].sum(), first)
    (expected,) = torch.autograd.grad(textbook(*wide).sum(), wide[0]) if len(wide[0]) else (wide[0].detach(),)
    assert_near(got[finite], expected, first.dtype, size_of(expected))


@fuzzed
@given(st.data(), st.sampled_from(sorted(PAIRS)))
def test_losses_of_pairs(data, name):
    draw = Draw(data)
    count, options, textbook = PAIRS[name]
    logps, fits = logps_of(draw, count, data.draw(sizes))
    call = lambda *given: getattr(losses, name)(*given, **options)  # noqa: E731
    got = outcome(lambda: call(*logps), *logps)
    assert (got is not None) == fits
    if not fits:
        return
    expected = textbook(margin(logps))
    assert got.dtype == (F64 if logps[0].dtype == F64 else torch.float32)
    assert_near(got, expected, got.dtype, size_of(margin(logps)))
    if len(got):
        assert_slopes(call, lambda *wide: textbook(margin(wide)), logps)


def size_of(values):
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if len(finite) else 1.0


@fuzzed
@given(st.data())
def test_the_reward_level(data):
    draw = Draw(data)
    (*logps, good, bad), fits = logps_of(draw, 6, data.draw(sizes))
    scale = draw.one(0.5, 10.0, 1e4)

    def call(*given):
        rewards = {"reward_chosen": given[4], "reward_rejected": given[5]}
        return losses.reward_level(*given[:4], beta=BETA, beta_reward=scale, **rewards)

    got = outcome(lambda: call(*logps, good, bad), *logps, good, bad)
    assert (got is not None) == fits
    if not fits:
        return

    def textbook(*wide):
        difference = scale * (wide[4].double() - wide[5].double())
        return labelled(BETA * margin(wide[:4]), torch.sigmoid(difference), torch.sigmoid(-difference))

    assert_near(got, textbook(*logps, good, bad), got.dtype, size_of(margin(logps)))
    if len(got):
        assert_slopes(call, textbook, [*logps, good, bad])


@fuzzed
@given(st.data())
def test_soft_labels_of_any_kind(data):
    draw = Draw(data)
    pairs = data.draw(sizes)
    z = draw.tensor(pairs, dtype=draw.one(*DTYPES), special=draw.one(False, True))
    q = torch.rand(pairs, generator=draw.generator, dtype=F64) * 3 - 1
    q[q < 0], q[q > 1.5] = 0.0, 1.0
    if draw.one(False, True):
        q = float(q[0]) if pairs else 0.3
    got = outcome(lambda: losses.soft_preference(z, q), z)
    wide = z.double()
    assert_near(got, labelled(wide, q, 1 - q), got.dtype, size_of(wide))


@fuzzed
@given(st.data())
def test_means_over_tokens(data):
    draw = Draw(data)
    sums = draw.tensor(data.draw(sizes), dtype=draw.one(*DTYPES), special=draw.one(False, True))
    counts = torch.randint(0, 4, (len(sums) + draw.one(*[0] * 9, 1),), generator=draw.generator)
    sums, counts = draw.elsewhere(sums, counts)
    got = outcome(lambda: losses.token_mean(sums, counts), sums)
    assert (got is not None) == (len(counts) == len(sums) and not sums.is_meta and not counts.is_meta)
    if got is not None:
        assert_near(got, sums.double() / counts.clamp(min=1), got.dtype)


def drdpo_of(per_pair, beta_prime):
    """-beta' log mean exp(-l / beta') with 60 digits: in float64 the logarithm's rounding counts beta' times."""
    values = [float(x) for x in per_pair]
    if not values or any(math.isnan(x) for x in values):
        return math.nan
    lowest = min(values)
    if math.isinf(lowest):
        return lowest
    with localcontext() as context:
        context.prec = 60
        least, beta = Decimal(lowest), Decimal(beta_prime)
        total = sum(((least - Decimal(x)) / beta).exp() for x in values if not math.isinf(x))
        return float(least - beta * (total / len(values)).ln())


@fuzzed
@given(st.data())
def test_aggregations_whole_and_in_parts(data):
    draw = Draw(data)
    per_pair = draw.tensor(data.draw(sizes), dtype=draw.one(*DTYPES), special=draw.one(False, True))
    beta_prime = draw.one(1.0, 0.3, 1e4)
    for call, expected, extra in (
        (losses.mean, per_pair.double().mean(), {}),
        (losses.drdpo, torch.tensor(drdpo_of(per_pair, beta_prime), dtype=F64), {"beta_prime": beta_prime}),
    ):
        got = outcome(lambda: call(per_pair, **extra), per_pair)  # noqa: B023
        assert (got is not None) == (len(per_pair) > 0)
        if got is None:
            continue
        assert_near(got, expected, got.dtype, size_of(per_pair.double()))
        if not per_pair.isfinite().all():
            continue
        given_pairs = per_pair.detach().requires_grad_()
        (slope,) = torch.autograd.grad(call(given_pairs, **extra), given_pairs)
        weights = torch.softmax(-per_pair.double() / beta_prime, 0) if extra else torch.full_like(slope, 1 / len(slope))
        assert_near(slope, weights, slope.dtype)
        cut = data.draw(st.integers(0, len(per_pair)))
        whole = losses.whole_batch([per_pair[:cut], per_pair[cut:]], **extra)
        shares = [call(part, whole=whole, **extra) for part in (per_pair[:cut], per_pair[cut:])]
        assert_near(shares[0] + shares[1], expected, got.dtype, size_of(per_pair.double()))


@fuzzed
@given(st.data())
def test_the_likelihood_of_chosen_responses(data):
    draw = Draw(data)
    sums = draw.tensor(data.draw(sizes), dtype=draw.one(*DTYPES), special=draw.one(False, True))
    counts = torch.randint(0, 4, (len(sums) + draw.one(*[0] * 9, 1),), generator=draw.generator)
    sums, counts = draw.elsewhere(sums, counts)
    fits = 0 < len(sums) == len(counts) and not sums.is_meta and not counts.is_meta
    got = outcome(lambda: losses.chosen_nll(sums, counts), sums)
    assert (got is not None) == fits
    if fits:
        assert_near(
            got, -sums.double().sum() / max(1, int(counts.sum())), got.dtype, size_of(sums.double()) * len(sums)
        )


@fuzzed
@given(st.data(), st.sampled_from(sorted(losses.PAIRWISE)), st.sampled_from(sorted(losses.AGGREGATIONS)))
def test_losses_by_name_are_the_functions(data, name, aggregation):
    draw = Draw(data)
    spec, pairs = losses.PAIRWISE[name], data.draw(st.sampled_from([1, 2, 5]))
    numbers = {"beta": BETA, "epsilon": EPSILON, "gamma": 0.5, "beta_reward": 2.0, "beta_prime": 0.7}
    options = {n: numbers[n] for n in (*spec.parameters, *losses.AGGREGATIONS[aggregation])}
    logps = [draw.tensor(pairs, dtype=F64) for _ in range(4 if spec.uses_reference else 2)]
    counts = [torch.randint(0, 4, (pairs,), generator=draw.generator) for _ in range(2)]
    rewards = [draw.tensor(pairs, dtype=F64) for _ in range(2)] if spec.uses_rewards else []
    weight = draw.one(0.0, 0.5)
    batch = losses.PreferenceBatch(
        **dict(zip(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), logps, strict=False)),
        **dict(zip(("reward_chosen", "reward_rejected"), rewards, strict=False)),
        chosen_counts=counts[0],
        rejected_counts=counts[1],
    )
    got = losses.PreferenceLoss(name, aggregation, nll=weight, **options)(batch)
    per_token = [x / c.clamp(min=1) for x, c in zip(logps, counts * 2, strict=False)] if spec.per_token else logps
    if name == "reward_level":
        difference = 2.0 * (rewards[0] - rewards[1])
        expected = labelled(BETA * margin(per_token), torch.sigmoid(difference), torch.sigmoid(-difference))
    elif name in ("ipo", "ipo_mean"):
        expected = (margin(per_token) - 1 / (2 * BETA)) ** 2
    else:
        expected = PAIRS[name][2](margin(per_token))
    assert_near(got.per_pair, expected, F64, size_of(margin(per_token)))
    whole = expected.mean() if aggregation == "mean" else torch.tensor(drdpo_of(expected, 0.7), dtype=F64)
    whole = whole - weight * logps[0].sum() / max(1, int(counts[0].sum()))
    assert_near(got.loss, whole, F64, 10 * size_of(margin(per_token)) ** 2 + 10)


@pytest.mark.parametrize("value", [math.nan, INF, -INF, 0.0, -1.0])
def test_parameters_out_of_range_are_refused(value):
    pair = [torch.zeros(2)] * 4
    for call in (
        lambda: losses.dpo(*pair, beta=value),
        lambda: losses.drdpo(pair[0], beta_prime=value),
        lambda: losses.reward_level(*pair, beta=1.0, reward_chosen=pair[0], reward_rejected=pair[0], beta_reward=value),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
