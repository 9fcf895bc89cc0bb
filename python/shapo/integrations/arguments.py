"""What a trainer must know of ShaPO besides its own arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shapo_kernels import ShaPOOptimizer, Subspace


@dataclass(frozen=True)
class ShaPOArguments:
    """Options of the perturbation; those of :class:`shapo_kernels.ShaPOOptimizer` under the same names.

    Attributes:
        subspace: the selected neurons.
        rho: the radius.
        relative, interval, ascent, perturbation, norm, sync: as the optimizer takes them.
        ascent_fraction: the share of each micro-batch's pairs (or rows) that the ascent looks at, rounded up;
            0 < ascent_fraction <= 1. The rows are drawn anew for each micro-batch, with ``seed``.
        plain_updates: how many updates are plain at the start: a warm start.
        seed: of the rows of a partial ascent.
    """

    subspace: Subspace
    rho: float
    relative: bool = False
    interval: int = 1
    ascent: str = "selective"
    perturbation: str = "auto"
    norm: str = "global"
    sync: bool = True
    ascent_fraction: float = 1.0
    plain_updates: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction is {self.ascent_fraction}: expected a share above 0, up to 1")
        if self.plain_updates < 0:
            raise ValueError(f"plain_updates is {self.plain_updates}: expected a number of updates, 0 or more")

    def wrap(self, base: torch.optim.Optimizer, model: torch.nn.Module) -> ShaPOOptimizer:
        """The optimizer that these options describe, around ``base``."""
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("relative", "interval", "ascent", "perturbation", "norm", "sync")
        }
        return ShaPOOptimizer(base, model, self.subspace, rho=self.rho, seed=self.seed, **options)
