"""Pass 1 of an update, what it looks at and how far it goes: for the loops and the trainers alike.

The last two are functions of the number of the update alone, so that a resumed run draws the same rows and takes the
same radii without having saved any of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shapo.checked import checked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shapo_kernels.update.radius import Rho


@checked
@dataclass(frozen=True)
class AscentPart:
    """The part of an ascent's pairs (or rows) that it looks at: a share of them, or a number.

    An ascent is over all micro-batches of an update, or over one where each has its own. Of several, whole
    micro-batches are drawn first and pairs of one more: as few forward passes as the number allows.

    Attributes:
        fraction: Share of the pairs, rounded up, in (0, 1].
        pairs: A number of pairs in its place; all where there are fewer.
        seed: Of the draws.

    Raises:
        ValueError: Out of range, or both a share and a number.
    """

    fraction: float = 1.0
    pairs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"ascent_fraction is {self.fraction}: expected a share above 0, up to 1")
        if self.pairs is None:
            return
        if self.pairs < 1:
            raise ValueError(f"ascent_pairs is {self.pairs}: expected a whole number of pairs, 1 or more")
        if self.fraction != 1:
            raise ValueError("ascent_fraction and ascent_pairs are two ways to say one thing: give one of them")

    @property
    def is_whole(self) -> bool:
        """Whether ascents look at everything."""
        return self.fraction == 1 and self.pairs is None

    def require_at_most(self, pairs: int) -> None:
        """Refuse a number that no ascent can have.

        Raises:
            ValueError: More than `pairs`, which are what an ascent is over.
        """
        if self.pairs is not None and self.pairs > pairs:
            raise ValueError(f"ascent_pairs is {self.pairs}, but an ascent is over {pairs} pairs: give fewer")

    def draw(self, sizes: Sequence[int], update: int, micro_batch: int = 0) -> list[list[int]]:
        """Positions, in rising order, of the drawn pairs in micro-batches of `sizes` pairs; [] where none is drawn.

        Args:
            sizes: Pairs of each micro-batch that the ascent is over.
            update: Number of the update.
            micro_batch: Number of the micro-batch, where each has its own ascent.
        """
        left = self._count(sum(sizes))
        generator = random.Random(f"{self.seed}/{update}/{micro_batch}")
        drawn: list[list[int]] = [[] for _ in sizes]
        for number in generator.sample(range(len(sizes)), len(sizes)):
            taken = min(left, sizes[number])
            drawn[number] = sorted(generator.sample(range(sizes[number]), taken))
            left -= taken
        return drawn

    def _count(self, pairs: int) -> int:
        if self.pairs is not None:
            return min(self.pairs, pairs)
        # A share like 0.1 of 30 pairs is 3, whatever the last bit of the product says.
        return min(pairs, max(1, math.ceil(self.fraction * pairs - 1e-9)))


@checked
@dataclass(frozen=True)
class RhoSchedule:
    """The radius of every update: plain ones at the start, a linear rise, then `rho`.

    Attributes:
        rho: The radius in the end; with the norm "none" it may be a range (low, high).
        plain_updates: Updates with the radius 0 at the start.
        warmup: Updates after those over which the radius rises from rho / warmup to rho.

    Raises:
        ValueError: A number of updates below 0.
    """

    rho: Rho
    plain_updates: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        for name, value in (("plain_updates", self.plain_updates), ("rho_warmup", self.warmup)):
            if value < 0:
                raise ValueError(f"{name} is {value}: expected a whole number of updates, 0 or more")

    @property
    def is_constant(self) -> bool:
        return not self.plain_updates and not self.warmup

    def at(self, update: int) -> Rho:
        """The radius of update number `update`, counted from 0."""
        risen = update - self.plain_updates + 1
        if risen <= 0:
            return 0.0
        factor = min(1.0, risen / self.warmup) if self.warmup else 1.0
        return tuple(factor * bound for bound in self.rho) if isinstance(self.rho, tuple) else factor * self.rho  # type: ignore[return-value]

    def ends_at(self) -> int:
        """The first update from which on the radius is `rho`."""
        return self.plain_updates + max(self.warmup - 1, 0)


@dataclass(frozen=True)
class Seen:
    """What an ascent sees of a micro-batch.

    Attributes:
        loss: Runs a forward pass and returns what the micro-batch adds to the ascent's loss. None if nothing is seen.
        whole: A forward pass of the whole micro-batch, whose lower blocks `reuse_prefix` keeps for the descent.
        rows: With `whole`, the rows that are seen.
    """

    loss: Callable[[], Tensor] | None
    whole: Callable[[], object] | None = None
    rows: Tensor | None = None


def ascend(optimizer: Any, micro_batches: Iterable[Seen], device: torch.device, *, scaler: Any = None) -> None:
    """Pass 1 over micro-batches. The descent draws the random numbers that it drew (dropout).

    Args:
        optimizer: A `ShaPOOptimizer`, due.
        device: Whose random state is restored in the end, beside the processor's.
        scaler: The GradScaler of fp16 training.
    """
    from shapo_kernels.update.random_state import RandomState

    state = RandomState(device)
    with optimizer.ascent():
        for seen in micro_batches:
            part = nullcontext() if seen.whole is None else optimizer.ascent_part(seen.whole, seen.rows)
            with part:
                if seen.loss is not None:
                    optimizer.ascend(seen.loss(), scaler=scaler)
    state.restore()
