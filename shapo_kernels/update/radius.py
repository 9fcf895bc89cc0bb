"""The radius of a perturbation: rho of each param group, and the scale that it gives each weight's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..distributed import total_over_parts
from ..model.targets import Target
from ..ops._checks import check_choice, check_not_negative, check_switches, check_whole
from ..ops.subspace_update import NORMS
from .base import Base

Rho: TypeAlias = "float | tuple[float, float]"


class Radius:
    r"""The factor s_l that turns the gradient of each weight l into its perturbation.

    .. math:: s_l = \frac{\rho_l}{N_l + \eta}, \qquad N_l = \|g_S\|_2 \text{ (global)}, \; \|g_l\|_2 \text{ (layer)},
              \; 1 \text{ (none)}

    A group's own `"rho"` comes before `rho`. Adadelta has a hyper-parameter of that name in every group: around
    such a base the key is `"shapo_rho"`. Groups are read at every use, so a schedule may write to them.

    Args:
        base: whose groups these are.
        rho: a length, or with `norm="none"` a `(low, high)` range to draw from.
        relative: rho is a multiple of the selected weights' norm.
        norm: "global", "layer" or "none".
        eta: added to the norm.
        seed: of the draws.
    """

    def __init__(self, base: Base, rho: Any, *, relative: bool, norm: str, eta: float, seed: int) -> None:
        check_choice("norm", norm, NORMS)
        check_switches(relative=relative)
        check_not_negative("eta", eta)
        check_whole("seed", seed)
        check_norm(norm, relative=relative)
        self._base, self.relative, self.norm, self.eta = base, relative, norm, eta
        self._draws = torch.Generator().manual_seed(seed)
        self._sent: tuple[Any, Tensor] | None = None
        self.key = "shapo_rho" if "rho" in base.optimizer.defaults else "rho"
        self._rho = checked_rho(rho, norm)
        for group in self.groups:
            self.check_group(group)

    @property
    def rho(self) -> Rho:
        """The radius of groups that carry none of their own."""
        return self._rho

    @rho.setter
    def rho(self, value: Rho) -> None:
        self._rho = checked_rho(value, self.norm)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups, which may carry radii of their own."""
        return self._base.optimizer.param_groups

    def check_group(self, group: Mapping[str, Any], norm: str | None = None) -> None:
        """Raises ValueError where a group's own radius is not valid, with this norm or the one in force."""
        if self.key in group:
            checked_rho(group[self.key], norm or self.norm)

    def any_positive(self) -> bool:
        return max(rho[1] if isinstance(rho, tuple) else rho for rho in self._all()) > 0

    def scale(
        self, targets: Sequence[Target], values: Sequence[Tensor], weight_squares: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The squared norms of the gradients, and the scales: float64 `[n]` each. Does not wait for the device.

        Args:
            weight_squares: squared norms of the selected weights, for a relative radius.
        """
        weights = weight_squares if self.relative else None
        options: dict[str, Any] = {"weight_squared_norms": weights, "norm": self.norm, "eta": self.eta}
        if not any(target.layout.computed_over for target in targets):
            return ops.norms_and_scale(values, self.of(targets), **options)
        squares = total_over_parts(ops.squared_norms(values), targets)
        return squares, ops.perturbation_scale(squares, self.of(targets), **options)

    def of(self, targets: Sequence[Target]) -> Tensor:
        """Each target's rho, float64 `[n]` on its device. A range is drawn from once for all its targets.

        Negative where the base maximises: the worst case then lies down the gradient.
        """
        group_of = {id(p): group for group, parameters in self._base.members() for p in parameters}
        drawn: dict[tuple[float, float], float] = {}
        radii = []
        for target in targets:
            group = group_of.get(id(target.parameter), self._base.optimizer.defaults)
            rho = checked_rho(group.get(self.key, self.rho), self.norm)
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

    def _draw(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self._draws, dtype=torch.float64).item()

    def _all(self) -> Iterator[Rho]:
        yield self.rho
        for group in self.groups:
            if self.key in group:
                yield checked_rho(group[self.key], self.norm)


def check_norm(norm: str, *, relative: bool) -> None:
    """Raises ValueError where a relative radius has no norm."""
    if relative and norm == "none":
        raise ValueError("relative=True needs a norm: use norm='global' or norm='layer'")


def check_draws(state: Any) -> None:
    """Raises ValueError for anything but the state of a generator on the CPU."""
    try:
        torch.Generator().set_state(state.cpu())
    except (AttributeError, TypeError, RuntimeError) as error:
        what = f"{state.dtype}, {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"the state's draws are damaged ({what}): expected the state of a torch.Generator") from error


def checked_rho(rho: Any, norm: str) -> Rho:
    """A radius, or with `norm="none"` a range of factors.

    Raises:
        ValueError: negative, NaN or infinite; a range where the norm allows none, or one that is not `low <= high`.
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
