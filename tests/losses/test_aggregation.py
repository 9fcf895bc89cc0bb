"""Dr.DPO and the mean: exact over micro-batches and ranks, finite, with the right limits (L3)."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapo_kernels import losses
from tests.support.rank_aggregation import Pairs, aggregate
from tests.support.ranks import run_ranks

mpmath.mp.dps = 60


def exact_drdpo(values, beta_prime):
    mean = mpmath.fsum(mpmath.exp(-mpmath.mpf(x) / beta_prime) for x in values) / len(values)
    return -beta_prime * mpmath.log(mean)


def exact_weights(values, beta_prime):
    exponentials = [mpmath.exp(-mpmath.mpf(x) / beta_prime) for x in values]
    return [x / mpmath.fsum(exponentials) for x in exponentials]


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4).map(lambda x: round(x, 6)), min_size=1, max_size=9),
    beta_prime=st.sampled_from([1e-6, 1e-2, 1.0, 30.0, 1e6, 1e12]),
)
def test_value_and_gradient_agree_with_exact_arithmetic(values, beta_prime):
    per_pair = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = losses.drdpo(per_pair, beta_prime=beta_prime)
    loss.backward()
    size = max(abs(x) for x in values)
    assert loss.item() == pytest.approx(float(exact_drdpo(values, mpmath.mpf(beta_prime))), rel=1e-13, abs=1e-14 * size)
    # The input of exp is rounded once at the size of l / beta'.
    tolerance = 1e-15 * (size / beta_prime + 1) + 1e-14
    for got, exact in zip(per_pair.grad.tolist(), exact_weights(values, mpmath.mpf(beta_prime)), strict=True):
        assert abs(got - float(exact)) <= tolerance


def test_loss_over_beta_prime_of_ten_thousand_is_finite_where_the_naive_form_is_not():
    for scale in (110.0, 1e4):
        per_pair = torch.tensor([scale, scale + 3, scale + 1], requires_grad=True)
        assert not torch.isfinite(-torch.log(torch.exp(-per_pair).mean()))
        loss = losses.drdpo(per_pair, beta_prime=1.0)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.allclose(per_pair.grad, torch.softmax(-per_pair.detach(), 0), rtol=1e-5)


def test_large_beta_prime_is_the_mean_and_small_the_minimum():
    per_pair = torch.tensor([0.7, 3.0, 0.2, 9.0], dtype=torch.float64)
    assert losses.drdpo(per_pair, beta_prime=1e15).item() == pytest.approx(per_pair.mean().item(), rel=1e-13)
    assert losses.drdpo(per_pair, beta_prime=1e-300).item() == pytest.approx(0.2, rel=1e-14)


def test_a_pair_with_a_large_loss_counts_less():
    per_pair = torch.tensor([0.5, 0.5, 20.0], requires_grad=True)
    losses.drdpo(per_pair, beta_prime=1.0).backward()
    assert per_pair.grad[2] < 1e-8
    assert per_pair.grad.sum().item() == pytest.approx(1)


def test_gradients_of_both_orders_are_right():
    per_pair = torch.tensor([0.3, 1.0, 2.5, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.drdpo(x, beta_prime=0.7), per_pair)
    assert torch.autograd.gradgradcheck(lambda x: losses.drdpo(x, beta_prime=0.7), per_pair)


@pytest.mark.parametrize("beta_prime", [None, 0.05, 1.0, 1e6])
@pytest.mark.parametrize("sizes", [(13,), (4, 4, 5), (1, 12), (1,) * 13])
def test_shares_of_micro_batches_add_up_to_the_whole_batch_in_value_and_gradient(beta_prime, sizes):
    pairs = Pairs()
    full = aggregate(pairs, slice(None), beta_prime)
    full.backward()
    expected = pairs.gradient()
    micro_batches = torch.arange(13).split(sizes)
    with torch.no_grad():
        whole = losses.whole_batch([pairs.losses(rows) for rows in micro_batches], beta_prime=beta_prime)
    assert whole.value.item() == pytest.approx(full.item(), rel=1e-12)
    total = 0.0
    for rows in micro_batches:
        share = aggregate(pairs, rows, beta_prime, whole=whole)
        share.backward()
        total += share.item()
    assert total == pytest.approx(full.item(), rel=1e-12)
    assert torch.allclose(pairs.gradient(), expected, rtol=1e-12, atol=1e-14)


def test_the_mean_of_micro_batch_means_would_not_be_exact():
    """Why `whole` is there: what naive accumulation computes differs by far more than rounding."""
    pairs = Pairs()
    full = losses.drdpo(pairs.losses(slice(None)), beta_prime=1.0)
    naive = torch.stack([losses.drdpo(pairs.losses(rows), beta_prime=1.0) for rows in torch.arange(13).split(1)]).mean()
    assert abs(full - naive) > 0.1


@pytest.mark.slow
def test_two_ranks_have_the_value_and_the_averaged_gradient_of_the_whole_batch(tmp_path):
    uneven, one_rank_idle = 4, 13
    cases = [{"first": f, "kind": k} for f in (uneven, one_rank_idle) for k in (None, 0.05, 1.0, 1e6, "nll")]
    pairs = Pairs()
    for case, ranks in zip(cases, run_ranks(tmp_path, 2, cases, "rank_aggregation.py"), strict=True):
        per_pair, kind = pairs.losses(slice(None)), case["kind"]
        if kind == "nll":
            full = per_pair.sum() / pairs.counts(slice(None)).sum()
        else:
            full = per_pair.mean() if kind is None else losses.drdpo(per_pair, beta_prime=kind)
        full.backward()
        expected = pairs.gradient()
        for at_once, in_micro_batches in ranks:
            for value, gradient in (at_once, in_micro_batches):
                assert value.item() == pytest.approx(full.item(), rel=1e-12)
                assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-14)


def test_a_share_cannot_be_differentiated_twice_in_silence():
    per_pair = torch.tensor([1.0, 2.0], requires_grad=True)
    whole = losses.whole_batch(per_pair, beta_prime=1.0)
    loss = losses.drdpo(per_pair, beta_prime=1.0, whole=whole)
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*pass all pairs as one tensor"):
        torch.autograd.grad(loss, per_pair, create_graph=True)


def test_results_are_fp32_for_16_bit_and_fp32_losses_and_fp64_for_fp64():
    for given_, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        per_pair = torch.ones(3, dtype=given_, requires_grad=True)
        whole = losses.whole_batch(per_pair, beta_prime=1.0)
        assert whole.value.dtype == torch.float64
        for loss in (
            losses.mean(per_pair),
            losses.drdpo(per_pair, beta_prime=1.0),
            losses.drdpo(per_pair, beta_prime=1.0, whole=whole),
        ):
            assert loss.dtype == expected


@pytest.mark.parametrize("beta_prime", [0.0, -1.0, math.nan, math.inf])
def test_beta_prime_must_be_finite_and_above_zero(beta_prime):
    with pytest.raises(ValueError, match="beta_prime is"):
        losses.drdpo(torch.ones(2), beta_prime=beta_prime)
    with pytest.raises(ValueError, match="beta_prime is"):
        losses.whole_batch(torch.ones(2), beta_prime=beta_prime)


def test_losses_that_are_no_batch_are_refused():
    for bad, error, message in (
        (torch.ones(()), ValueError, r"shape \[\]"),
        (torch.ones(2, 2), ValueError, r"shape \[2, 2\]"),
        (torch.zeros(0), ValueError, "empty"),
        (torch.ones(2, dtype=torch.int64), TypeError, "int64"),
    ):
        with pytest.raises(error, match=message):
            losses.drdpo(bad, beta_prime=1.0)
        with pytest.raises(error, match=message):
            losses.mean(bad)


def test_a_whole_batch_of_other_parameters_is_refused():
    per_pair = torch.ones(2)
    with pytest.raises(ValueError, match=r"made with beta_prime=2.0 and is used with 1.0"):
        losses.drdpo(per_pair, beta_prime=1.0, whole=losses.whole_batch(per_pair, beta_prime=2.0))
    with pytest.raises(ValueError, match=r"made with beta_prime=2.0 and is used with None"):
        losses.mean(per_pair, whole=losses.whole_batch(per_pair, beta_prime=2.0))
    with pytest.raises(ValueError, match="either group or whole"):
        losses.mean(per_pair, group=object(), whole=losses.whole_batch(per_pair))
