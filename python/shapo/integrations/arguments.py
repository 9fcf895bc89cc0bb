"""What a trainer must know of ShaPO besides its own arguments."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from shapo.checked import checked
from shapo.config import UpdateOptions
from shapo.options import declared, option
from shapo_kernels import ShaPOOptimizer, Subspace


@checked
@dataclass(frozen=True)
class ShaPOArguments(UpdateOptions):
    """Options of the perturbation: subspace, `rho`, and those of :class:`shapo.config.UpdateOptions`.

    A trainer that is given a ready :class:`shapo_kernels.ShaPOOptimizer` takes only the options that are not the
    optimizer's: `ascent_fraction`, `ascent_pairs`, `per_micro_batch`, `plain_updates`, `rho_warmup`,
    `seed`. A partial ascent draws from the pairs (or rows) of an update on each rank.

    Raises:
        ValueError: an option out of range.
    """

    subspace: Subspace | None = option("the selected neurons", None, optimizers=True)
    _: KW_ONLY
    sync: bool = option("average the direction over the ranks", True, optimizers=True)
    seed: int = option("of the rows of a partial ascent, and of the draws from a range of radii", 0)

    def __post_init__(self) -> None:
        self.part(self.seed)
        self.schedule(0.0)

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
        own = [field for field, told in declared(type(self)).values() if told.optimizers]
        given = [field.name for field in own if getattr(self, field.name) != field.default]
        if given:
            raise ValueError(
                f"optimizers has a ShaPOOptimizer, which has its own {', '.join(given)}: "
                f"leave {'it' if len(given) == 1 else 'them'} out of ShaPOArguments"
            )

    def wrap(self, base: torch.optim.Optimizer, model: torch.nn.Module) -> ShaPOOptimizer:
        """The optimizer that these options describe, around `base`."""
        self.require_an_optimizers_options()
        return ShaPOOptimizer(base, model, seed=self.seed, **self.for_optimizer())
