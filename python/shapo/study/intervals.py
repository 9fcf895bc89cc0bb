"""Bootstrap intervals that draw prompts, not pairs: the pairs of one prompt are no independent cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    names, position = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(values), len(names)))
    for column, row in enumerate(values):
        np.add.at(sums[column], position, row)
    sizes = np.bincount(position).astype(np.float64)
    weights = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=_DRAWS)
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
    names, position = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(table), len(names)))
    for number, row in enumerate(table):
        np.add.at(sums[number], position, row)
    sizes = np.bincount(position).astype(np.float64)
    draw = np.random.default_rng(seed)
    of_runs = draw.multinomial(len(table), [1 / len(table)] * len(table), size=_DRAWS) / len(table)
    of_groups = draw.multinomial(len(names), [1 / len(names)] * len(names), size=_DRAWS)
    means = ((of_runs @ sums) * of_groups).sum(axis=1) / (of_groups @ sizes)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(table.mean()), float(low), float(high)
