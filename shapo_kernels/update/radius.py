"""The radius rho of each parameter group: checked, drawn where it is a range, sent to the device once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..interop.deepspeed import EngineStep
from ..model.targets import Target

Rho: TypeAlias = "float | tuple[float, float]"


class Radii:
    """The radii of an optimizer's param groups; ``group["rho"]`` where a group has one, else ``default``.

    Adadelta has a hyper-parameter of that name in every group: around such a base the key is ``"shapo_rho"``.

    Args:
        base: whose groups are read anew at every use, so that a schedule may write to them.
        norm: the optimizer's; only "none" allows ranges.
        seed: of the draws from ranges.
    """

    def __init__(self, base: Optimizer, rho: Any, norm: str, seed: int) -> None:
        self._base = base
        self.norm = norm
        self._draws = torch.Generator().manual_seed(seed)
        self._sent: tuple[Any, Tensor] | None = None
        self.key = "shapo_rho" if "rho" in base.defaults else "rho"
        self.default = checked_rho(rho, norm)
        for group in base.param_groups:
            self.check(group)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse a group whose radius is none."""
        if self.key in group:
            checked_rho(group[self.key], self.norm)

    def any_positive(self) -> bool:
        return max(rho[1] if isinstance(rho, tuple) else rho for rho in self._all()) > 0

    def of(self, targets: Sequence[Target]) -> Tensor:
        """Each target's radius, float64 ``[n]`` on its device. A range is drawn from once for all its targets.

        Negative where the base maximises: what is worst for it lies down the gradient. The loss negated and minimised
        is the same training.
        """
        group_of = {id(p): group for group, parameters in self._members() for p in parameters}
        drawn: dict[tuple[float, float], float] = {}
        radii = []
        for target in targets:
            group = group_of.get(id(target.parameter), self._base.defaults)
            rho = checked_rho(group.get(self.key, self.default), self.norm)
            if isinstance(rho, tuple):
                if rho not in drawn:
                    drawn[rho] = self._draw(*rho)
                rho = drawn[rho]
            radii.append(-rho if group.get("maximize", False) else rho)
        device = targets[0].parameter.device
        key = (device, tuple(radii))
        if self._sent is None or self._sent[0] != key:
            self._sent = (key, torch.tensor(radii, dtype=torch.float64, device=device))
        return self._sent[1]

    def draws_state(self) -> Tensor:
        return self._draws.get_state()

    def load_draws(self, state: Tensor) -> None:
        self._draws.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draws": self.draws_state(), "_sent": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._draws = torch.Generator()
        self._draws.set_state(state["_draws"])

    def _members(self) -> Iterator[tuple[dict[str, Any], Sequence[Tensor]]]:
        """Each group and the model's parameters in it."""
        if isinstance(self._base, EngineStep):
            return self._base.members()
        return ((group, group["params"]) for group in self._base.param_groups)

    def _draw(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self._draws, dtype=torch.float64).item()

    def _all(self) -> Iterator[Rho]:
        yield self.default
        for group in self._base.param_groups:
            if self.key in group:
                yield checked_rho(group[self.key], self.norm)


def checked_rho(rho: Any, norm: str) -> Rho:
    """A radius, or with ``norm="none"`` a range of factors.

    Raises:
        ValueError: negative, NaN or infinite; a range where the norm allows none, or one that is not ``low <= high``.
    """
    if isinstance(rho, (tuple, list)):
        if norm != "none":
            raise ValueError(f"rho is the range {tuple(rho)}: only norm='none' draws from a range; give one number")
        if len(rho) != 2 or not all(_is_radius(bound) for bound in rho) or rho[0] > rho[1]:
            raise ValueError(f"rho is {rho!r}: expected (low, high) with 0 <= low <= high")
        return float(rho[0]), float(rho[1])
    if not _is_radius(rho):
        raise ValueError(f"rho is {rho!r}: expected a finite number, 0 or more")
    return float(rho)


def _is_radius(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
