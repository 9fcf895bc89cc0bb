"""Label noise (T3): exact, recorded, nested, for any pairs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shapo.data.noise import flip_labels
from shapo.data.pairs import PreferencePair
from shapo.errors import UserError


def pairs(count: int) -> list[PreferencePair]:
    return [PreferencePair(f"p{n}", f"c{n}", f"r{n}", "k", False, True) for n in range(count)]


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 2**40))
def test_exactly_the_share_of_the_labels_is_flipped_and_recorded(count: int, rate: float, seed: int) -> None:
    clean = pairs(count)
    noisy = flip_labels(clean, rate, seed=seed)
    assert sum(pair.flipped for pair in noisy) == round(rate * count)
    for before, after in zip(clean, noisy, strict=True):
        if after.flipped:
            assert (after.prompt, after.category) == (before.prompt, before.category)
            assert (after.chosen, after.rejected) == (before.rejected, before.chosen)
            assert (after.chosen_unsafe, after.rejected_unsafe) == (True, False)
        else:
            assert after is before


@given(st.integers(0, 60), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.integers())
def test_the_flips_of_a_rate_contain_those_of_a_smaller_one(count: int, rates: tuple[float, float], seed: int) -> None:
    fewer, more = (flip_labels(pairs(count), rate, seed=seed) for rate in sorted(rates))
    assert all(there.flipped for here, there in zip(fewer, more, strict=True) if here.flipped)


def test_seeds_flip_different_rows_and_one_seed_the_same() -> None:
    flips = [[pair.flipped for pair in flip_labels(pairs(100), 0.3, seed=seed)] for seed in (0, 1, 0)]
    assert flips[0] == flips[2] != flips[1]


def test_flips_are_spread_evenly_over_positions() -> None:
    counts = [0] * 40
    for seed in range(300):
        for position, pair in enumerate(flip_labels(pairs(40), 0.25, seed=seed)):
            counts[position] += pair.flipped
    # Binomial(300, 1/4): mean 75, standard deviation 7.5.
    assert max(abs(count - 75) for count in counts) < 5 * 7.5


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_rate_outside_zero_to_one_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=r"noise rate is .*; expected a share between 0 and 1"):
        flip_labels(pairs(3), rate, seed=0)
