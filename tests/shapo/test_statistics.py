"""Shares, bounds, agreement and paired comparisons against published and hand-computed values."""

from __future__ import annotations

import math

import pytest

from shapo.statistics import (
    bounded_share,
    by_group,
    cohen_kappa,
    mcnemar,
    paired_difference,
    unsafe_case,
    wilson,
    win_rate,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (the score interval without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    share = wilson(successes, n)
    assert share.value == successes / n
    assert share.low == pytest.approx(low, abs=5e-5)
    assert share.high == pytest.approx(high, abs=5e-5)


def test_no_cases_give_no_share_and_the_whole_interval():
    share = wilson(0, 0)
    assert math.isnan(share.value)
    assert (share.low, share.high) == (0.0, 1.0)


def test_a_share_is_bounded_by_what_unreadable_cases_may_be():
    verdicts = ["unsafe", " UNSAFE ", "safe", "safe", "safe", "I cannot say", None, "safe"]
    share = bounded_share([unsafe_case(verdict) for verdict in verdicts])
    assert (share.n, share.yes, share.no, share.unreadable) == (8, 2, 4, 2)
    assert (share.low, share.high) == (0.25, 0.5)
    assert share.interval_low == wilson(2, 8).low
    assert share.interval_high == wilson(4, 8).high


def test_groups_are_counted_apart():
    shares = by_group([True, None, False, True], ["b", "b", "a", "b"])
    assert list(shares) == ["a", "b"]
    assert (shares["b"].low, shares["b"].high) == (2 / 3, 1.0)


def test_a_judge_that_goes_by_the_position_gives_even_odds():
    assert win_rate([("a", "b"), ("b", "a")])["value"] == 0.5


def test_a_win_needs_both_orders():
    wins = win_rate([("a", "a"), ("a", "tie"), ("b", "b"), ("tie", "tie"), ("?", "a")])
    assert wins["value"] == (1 + 0.5 + 0 + 0.5) / 4
    assert (wins["n"], wins["unparsed"], wins["orders_agree"]) == (4, 1, 3)


def test_cohens_kappa_of_three_labels_follows_its_definition():
    table = {("a", "a"): 50, ("a", "b"): 26, ("a", "c"): 24, ("b", "a"): 24, ("b", "b"): 4, ("b", "c"): 32,
             ("c", "a"): 6, ("c", "b"): 30, ("c", "c"): 4}  # fmt: skip
    pairs = [pair for pair, count in table.items() for _ in range(count)]
    rows = {"a": 100, "b": 60, "c": 40}
    columns = {"a": 80, "b": 60, "c": 60}
    observed, expected = 58 / 200, sum(rows[k] * columns[k] for k in "abc") / 200**2
    found = cohen_kappa(*zip(*pairs, strict=True))
    assert found.kappa == pytest.approx((observed - expected) / (1 - expected))
    assert found.agreement == pytest.approx(0.29)


def test_kappa_of_a_two_by_two_table():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5, kappa = 0.4.
    pairs = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15 + [(None, 1), (0, None)]
    found = cohen_kappa(*zip(*pairs, strict=True))
    assert found.kappa == pytest.approx(0.4)
    assert (found.n, found.left_out) == (50, 2)
    half = 1.959964 * math.sqrt(0.7 * 0.3 / 50) / 0.5
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half))


def test_kappa_is_undefined_where_both_judges_only_say_one_thing():
    assert math.isnan(cohen_kappa([1, 1], [1, 1]).kappa)
    assert math.isnan(cohen_kappa([None], [1]).kappa)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    # Exact binomial tails at 1/2: 2 (1 + 10 + 45) / 1024; 2 (1 + 6) / 64; symmetric; no discordant pairs; and b = c.
    [(2, 8, 112 / 1024), (5, 1, 14 / 64), (8, 2, 112 / 1024), (0, 0, 1.0), (3, 3, 1.0), (0, 10, 2 / 1024)],
)
def test_mcnemars_exact_p_is_the_binomial_tail(b, c, p):
    assert mcnemar(b, c) == pytest.approx(p)


def test_a_paired_difference_counts_prompts_that_both_could_be_read_on():
    first = [True] * 30 + [False] * 60 + [None, True]
    second = [True] * 10 + [False] * 20 + [True] * 5 + [False] * 55 + [True, None]
    found = paired_difference(first, second)
    assert (found.n, found.left_out, found.only_first, found.only_second) == (90, 2, 20, 5)
    assert found.difference == pytest.approx(-15 / 90)
    # The normal interval of a mean of n paired differences: mean -+ 1.96 sqrt(var / n); the bootstrap's is close to it.
    half = 1.96 * math.sqrt((25 / 90 - (15 / 90) ** 2) / 90)
    assert found.low == pytest.approx(-15 / 90 - half, abs=0.012)
    assert found.high == pytest.approx(-15 / 90 + half, abs=0.012)
    assert found == paired_difference(first, second)


def test_a_model_does_not_differ_from_itself():
    found = paired_difference([True, False, None], [True, False, None])
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
