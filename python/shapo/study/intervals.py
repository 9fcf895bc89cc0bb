"""Bootstrap intervals that draw prompts, not pairs: the pairs of one prompt are no independent cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "clustered", "crossed"]

Interval = tuple[float, float, float]
"""Estimate, lower and upper limit at 95 %."""

_DRAWS = 4000


def clustered(
    columns: Sequence[Sequence[float]],
    groups: Sequence[int],
    statistic: Callable[..., NDArray[np.float64]],
    *,
    seed: int = 0,
) -> Interval:
    """A statistic of column means with its percentile interval, whole groups drawn with replacement.

    Args:
        columns: Some values of each of N cases.
        groups: The group of each case.
        statistic: Of one mean a column, each an array with an entry a draw; gives such an array.
        seed: Of the draws.
    """
    values = np.asarray(columns, dtype=np.float64)
    sums, sizes = _by_group(values, groups)
    (weights,) = _draws(seed, len(sizes))
    means = (weights @ sums.T) / (weights @ sizes)[:, None]
    drawn = statistic(*means.T)
    low, high = np.percentile(drawn[np.isfinite(drawn)], (2.5, 97.5)) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return float(statistic(*values.mean(axis=1)[:, None])[0]), float(low), float(high)


def crossed(values: Sequence[Sequence[float]], groups: Sequence[int], *, seed: int = 0) -> Interval:
    """The mean of values by run and case with its percentile interval, runs and groups both drawn with replacement.

    Every run has seen the same cases, so the two are drawn independently. With three runs the interval is a rough one:
    there are only ten different draws of them.

    Args:
        values: `[runs][cases]`.
        groups: The group of each case.
        seed: Of the draws.
    """
    table = np.asarray(values, dtype=np.float64)
    sums, sizes = _by_group(table, groups)
    of_runs, of_groups = _draws(seed, len(table), len(sizes))
    means = ((of_runs / len(table) @ sums) * of_groups).sum(axis=1) / (of_groups @ sizes)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(table.mean()), float(low), float(high)


def _by_group(rows: NDArray[np.float64], groups: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums over each group's cases, `[rows][groups]`, and how many cases each has."""
    _, position = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(position).astype(np.float64)
    return np.stack([np.bincount(position, weights=row, minlength=len(sizes)) for row in rows]), sizes


@cache
def _draws(seed: int, *counts: int) -> tuple[NDArray[np.int64], ...]:
    """For each count, how often each of so many things comes up where as many are drawn, `[draws][count]`.

    Kept, as the hundreds of comparisons of a report are about the same few counts.
    """
    generator = np.random.default_rng(seed)
    return tuple(generator.multinomial(count, [1 / count] * count, size=_DRAWS) for count in counts)
