"""Several sources of pairs as one set, in given shares or one after the other."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapo.checked import checked
from shapo.data.formats import load_pairs
from shapo.data.noise import rank
from shapo.data.pairs import PairSet, PreferencePair
from shapo.errors import UserError

__all__ = ["load_mixture", "parse_source"]

_WEIGHTED = re.compile(r"(.+):([0-9.]+(?:[eE][+-]?[0-9]+)?)")


def parse_source(text: str) -> tuple[str, float | None]:
    """`NAME:WEIGHT` as name and weight; the weight is None where there is none, or where a file has this very name.

    Raises:
        UserError: a weight that is not a number above 0.
    """
    weighted = _WEIGHTED.fullmatch(text)
    if weighted is None or Path(text).exists():
        return text, None
    try:
        weight = float(weighted[2])
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"the weight of {text} is {weighted[2]}; expected a number above 0")
    return weighted[1], weight


@checked
def load_mixture(sources: Sequence[str], *, limit: int | None = None, **options: Any) -> PairSet:
    """The pairs of several sources, in the order of the sources.

    With weights, `["a.jsonl:0.7", "b:0.3"]`, every source gives its share of the whole, which is as large as it can
    be without a pair twice, or `limit`. A hash of their positions decides which pairs of a source are taken: they are
    spread over the file and the same in every run, and a larger mixture has those of a smaller one. Without weights all
    pairs are taken.

    Args:
        sources: names as for `load_pairs`, each with or without `:WEIGHT`; all of them or none. Weights are relative.
        limit: at most this many pairs in all.
        options: of `load_pairs`, for every source.

    Raises:
        UserError: as `load_pairs`; no source; weights for a part of the sources, or for a single one.
    """
    named = [parse_source(source) for source in sources]
    weights = [weight for _, weight in named if weight is not None]
    if not named:
        raise UserError("no source of pairs is given")
    if weights and (len(weights) < len(named) or len(named) == 1):
        raise UserError(
            f"{len(weights)} of {len(named)} sources have a weight; give each of several one (NAME:WEIGHT) or none"
        )
    if not weights:
        return _in_turn([name for name, _ in named], limit, options)
    shares = [weight / sum(weights) for weight in weights]
    sets = [load_pairs(name, **options) for name, _ in named]
    whole = min(int(len(pairs) / share + 1e-9) for pairs, share in zip(sets, shares, strict=True))
    counts = _counts(shares, whole if limit is None else min(whole, limit))
    parts = [_taken(pairs.pairs, count) for pairs, count in zip(sets, counts, strict=True)]
    return _joined(sets, parts, [f"{share:.3g}, {len(found)} pairs" for share, found in zip(shares, sets, strict=True)])


def _in_turn(names: Sequence[str], limit: int | None, options: dict[str, Any]) -> PairSet:
    sets: list[PairSet] = []
    parts: list[list[PreferencePair]] = []
    for name in names:
        left = None if limit is None else limit - sum(map(len, parts))
        # Where nothing is left to take, the source is looked at all the same: a wrong name is told.
        sets.append(load_pairs(name, limit=None if left is None else max(left, 1), **options))
        parts.append(sets[-1].pairs[:left])
    return sets[0] if len(sets) == 1 else _joined(sets, parts, [""] * len(sets))


def _counts(shares: Sequence[float], whole: int) -> list[int]:
    """Whole numbers that add up to `whole`, by the largest remainders."""
    counts = [int(share * whole + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index] * whole)
    for index in by_remainder[: whole - sum(counts)]:
        counts[index] += 1
    return counts


def _taken(pairs: Sequence[PreferencePair], count: int) -> list[PreferencePair]:
    ranked = sorted(range(len(pairs)), key=lambda position: rank(0, position))
    return [pairs[position] for position in sorted(ranked[:count])]


def _joined(sets: Sequence[PairSet], parts: Sequence[list[PreferencePair]], notes: Sequence[str]) -> PairSet:
    dropped = Counter[str]()
    for one in sets:
        dropped.update(one.dropped)
    sources = [
        f"{len(part)} of {one.source}" + (f" ({note})" if note else "")
        for one, part, note in zip(sets, parts, notes, strict=True)
    ]
    return PairSet(
        [pair for part in parts for pair in part],
        dict(dropped),
        " + ".join(sources),
        "+".join(sorted({one.format for one in sets})),
        any(one.messages for one in sets),
    )
