"""What a trainer must know of ShaPO besides its own arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from shapo.ascents import AscentPart, Rho, RhoSchedule
from shapo_kernels import ShaPOOptimizer, Subspace

_OF_THE_OPTIMIZER = ("subspace", "rho", "relative", "interval", "ascent", "perturbation", "norm", "sync")


@dataclass(frozen=True)
class ShaPOArguments:
    """Options of the perturbation.

    The first ones are those of :class:`shapo_kernels.ShaPOOptimizer`, under the same names; a trainer that is given a
    ready ``ShaPOOptimizer`` takes the others alone.

    Attributes:
        subspace: the selected neurons.
        rho: the radius.
        relative, interval, ascent, perturbation, norm, sync: as the optimizer takes them.
        ascent_fraction, ascent_pairs: the share, or the number, of the pairs (or rows) of an update on each rank that
            the ascent looks at; drawn with ``seed``. See :class:`shapo.ascents.AscentPart`.
        per_micro_batch: each micro-batch has an ascent and a perturbation of its own (m-sharpness).
        plain_updates: how many updates are plain at the start: a warm start.
        rho_warmup: over how many updates after those the radius rises linearly.
        seed: of the rows of a partial ascent, and of the draws from a range of radii.

    Raises:
        ValueError: an option out of range.
    """

    subspace: Subspace | None = None
    rho: Rho | None = None
    relative: bool = False
    interval: int = 1
    ascent: str = "selective"
    perturbation: str = "auto"
    norm: str = "global"
    sync: bool = True
    ascent_fraction: float = 1.0
    ascent_pairs: int | None = None
    per_micro_batch: bool = False
    plain_updates: int = 0
    rho_warmup: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self.part()
        self.schedule(0.0)

    def part(self) -> AscentPart:
        """What ascents look at."""
        return AscentPart(self.ascent_fraction, self.ascent_pairs, self.seed)

    def schedule(self, rho: Rho) -> RhoSchedule:
        """The radius of every update, ``rho`` in the end."""
        return RhoSchedule(rho, self.plain_updates, self.rho_warmup)

    def require_an_optimizers_options(self) -> None:
        """Refuse to wrap an optimizer without knowing where and how far.

        Raises:
            TypeError: no subspace or no radius.
        """
        missing = [name for name in ("subspace", "rho") if getattr(self, name) is None]
        if missing:
            raise TypeError(
                f"shapo lacks {' and '.join(missing)}: give shapo=ShaPOArguments(subspace, rho=…), "
                "or a ready optimizer, optimizers=(ShaPOOptimizer(…), None)"
            )

    def refuse_an_optimizers_options(self) -> None:
        """Refuse to say twice what a ready ShaPOOptimizer says.

        Raises:
            ValueError: an option of the optimizer is given.
        """
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name in _OF_THE_OPTIMIZER if getattr(self, name) != defaults[name]]
        if given:
            raise ValueError(
                f"optimizers has a ShaPOOptimizer, which has its own {', '.join(given)}: "
                f"leave {'it' if len(given) == 1 else 'them'} out of ShaPOArguments"
            )

    def wrap(self, base: torch.optim.Optimizer, model: torch.nn.Module) -> ShaPOOptimizer:
        """The optimizer that these options describe, around ``base``."""
        self.require_an_optimizers_options()
        options: dict[str, Any] = {name: getattr(self, name) for name in _OF_THE_OPTIMIZER}
        return ShaPOOptimizer(base, model, seed=self.seed, **options)
