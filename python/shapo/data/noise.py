"""Label noise: exchange chosen and rejected in a given share of the pairs. For training splits, not for evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from shapo.checked import checked
from shapo.data.pairs import PreferencePair
from shapo.errors import UserError

__all__ = ["flip_labels", "rank"]


@checked
def flip_labels(pairs: Sequence[PreferencePair], rate: float, *, seed: int) -> list[PreferencePair]:
    """Flip exactly `round(rate * len(pairs))` labels and record which.

    Rows are ranked by a hash of (seed, position) and the lowest are flipped. So the flips of a rate contain those of
    every smaller rate with the same seed, whatever the data set, and no random generator's version matters.

    Args:
        pairs: any sequence of pairs; order and length are kept, nothing is changed in place.
        rate: share of labels to flip, in [0, 1].
        seed: chooses the rows.

    Returns:
        The pairs; in the flipped rows `chosen`, `rejected` and their unsafe flags are exchanged, `flipped` is inverted.

    Raises:
        UserError: a rate outside [0, 1].
    """
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise UserError(f"the noise rate is {rate}; expected a share between 0 and 1")
    order = sorted(range(len(pairs)), key=lambda position: rank(seed, position))
    chosen = set(order[: round(rate * len(pairs))])
    return [_flip(pair) if position in chosen else pair for position, pair in enumerate(pairs)]


def rank(seed: int, key: object) -> bytes:
    """The place of a position or a text in an order that looks drawn and depends on no random generator."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def _flip(pair: PreferencePair) -> PreferencePair:
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_unsafe=pair.rejected_unsafe,
        rejected_unsafe=pair.chosen_unsafe,
        flipped=not pair.flipped,
    )
