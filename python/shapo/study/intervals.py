"""Bootstrap intervals that draw prompts, not pairs: the pairs of one prompt are no independent cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "clustered"]

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
