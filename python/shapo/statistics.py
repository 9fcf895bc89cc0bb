"""Shares with intervals, bounds where verdicts are unreadable, agreement, and paired comparisons. Numbers in, numbers
out.

Closed forms, with their sources; nothing here knows files or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054  # the two-sided 95 % point of the normal distribution
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Share:
    """A share of n cases with its 95 % confidence interval (Wilson's score interval)."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(successes: float, n: int) -> Share:
    r"""Wilson's score interval at 95 %:

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Halves count (ties); n = 0 gives NaN in [0, 1].
    """
    if n == 0:
        return Share(math.nan, 0.0, 1.0, 0)
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Share(p, max(0.0, centre - half), min(1.0, centre + half), n)


@dataclass(frozen=True)
class BoundedShare:
    """A share where some cases could not be read.

    Attributes:
        n, yes, no, unreadable: Counts; n is their sum.
        low, high: The share if every unreadable case were a no, and if every one were a yes.
        interval_low, interval_high: 95 % limits: the lower Wilson limit of `low`, the upper one of `high`.
    """

    n: int
    yes: int
    no: int
    unreadable: int
    low: float
    high: float
    interval_low: float
    interval_high: float


def bounded_share(cases: Sequence[bool | None]) -> BoundedShare:
    """The share of True among `cases`, None being unreadable; without cases NaN in [0, 1]."""
    yes, no, n = sum(case is True for case in cases), sum(case is False for case in cases), len(cases)
    unreadable = n - yes - no
    least, most = wilson(yes, n), wilson(yes + unreadable, n)
    return BoundedShare(n, yes, no, unreadable, least.value, most.value, least.low, most.high)


def unsafe_case(verdict: Any) -> bool | None:
    """True for "unsafe" and False for "safe", in any case; None, unreadable, for anything else."""
    return {"unsafe": True, "safe": False}.get(str(verdict).strip().lower())


def by_group(cases: Sequence[bool | None], groups: Sequence[str]) -> dict[str, BoundedShare]:
    """`bounded_share` of each group, in the order of their names."""
    return {
        name: bounded_share([case for case, group in zip(cases, groups, strict=True) if group == name])
        for name in sorted(set(groups))
    }


def win_rate(comparisons: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Win rate of model A over B from a judge asked in both orders.

    Args:
        comparisons: For each prompt the winner ("a", "b" or "tie") when A's answer stood first and when B's did.

    A prompt is won only where both orders say so, lost likewise, and a tie (half a win) where they disagree or say so;
    a judge that goes by the position therefore gives 0.5.  Prompts with an unreadable verdict are counted and left out.
    """
    scores = [_won(first, second) for first, second in comparisons]
    counted = [score for score in scores if score is not None]
    share = wilson(sum(counted), len(counted))
    agree = sum(
        first == second for (first, second), score in zip(comparisons, scores, strict=True) if score is not None
    )
    return {**share.as_dict(), "unparsed": len(scores) - len(counted), "orders_agree": agree}


def _won(first: Any, second: Any) -> float | None:
    if first not in ("a", "b", "tie") or second not in ("a", "b", "tie"):
        return None
    if first == second and first != "tie":
        return 1.0 if first == "a" else 0.0
    return 0.5


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree, over the answers that both could read.

    Attributes:
        kappa: Cohen's: (p_o - p_e) / (1 - p_e), p_e from the two judges' own shares; NaN where p_e is 1.
        agreement: p_o, the share of equal verdicts.
        n, left_out: Answers read by both, and those that one of them could not read.
        low, high: kappa -+ 1.96 standard errors, sqrt(p_o (1 - p_o) / n) / (1 - p_e) (Cohen 1960), within [-1, 1].
    """

    kappa: float
    low: float
    high: float
    agreement: float
    n: int
    left_out: int


def cohen_kappa(first: Sequence[Any], second: Sequence[Any]) -> Agreement:
    """Agreement of two judges on the same answers; None is unreadable (Cohen, 1960)."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    n, left_out = len(pairs), len(first) - len(pairs)
    if not n:
        return Agreement(math.nan, -1.0, 1.0, math.nan, 0, left_out)
    observed = sum(a == b for a, b in pairs) / n
    labels = {label for pair in pairs for label in pair}
    expected = sum(sum(a == label for a, _ in pairs) * sum(b == label for _, b in pairs) for label in labels) / n**2
    if expected == 1:
        return Agreement(math.nan, -1.0, 1.0, observed, n, left_out)
    kappa = (observed - expected) / (1 - expected)
    half = _Z95 * math.sqrt(observed * (1 - observed) / n) / (1 - expected)
    return Agreement(kappa, max(-1.0, kappa - half), min(1.0, kappa + half), observed, n, left_out)


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same prompts: the second's share minus the first's.

    Attributes:
        difference: Over the prompts that are readable for both.
        low, high: 95 % percentile interval of 10,000 paired bootstrap draws of prompts.
        only_first, only_second: Prompts that are yes for one of them alone.
        p_value: McNemar's exact test, two-sided: the binomial probability, at 1/2, of a split of the `only_` prompts
            that is at least as uneven.
        n, left_out: Prompts counted, and those with an unreadable verdict.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float
    n: int
    left_out: int


def paired_difference(first: Sequence[bool | None], second: Sequence[bool | None]) -> PairedDifference:
    """Compares two models' verdicts on the same prompts, in the same order."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    n, left_out = len(pairs), len(first) - len(pairs)
    only_first, only_second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    p_value = mcnemar(only_first, only_second)
    if not n:
        return PairedDifference(math.nan, -1.0, 1.0, 0, 0, p_value, 0, left_out)
    low, high = _bootstrap(only_first, only_second, n)
    return PairedDifference((only_second - only_first) / n, low, high, only_first, only_second, p_value, n, left_out)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p: min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c)); 1 without discordant
    pairs."""
    n, least = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


def _bootstrap(minus: int, plus: int, n: int) -> tuple[float, float]:
    """Percentiles of the mean of n draws from the pairs' differences, which are -1, 0 or 1: a trinomial draw."""
    shares = [minus / n, plus / n, (n - minus - plus) / n]
    counts = np.random.default_rng(0).multinomial(n, shares, size=_RESAMPLES)
    low, high = np.percentile((counts[:, 1] - counts[:, 0]) / n, [2.5, 97.5])
    return float(low), float(high)
