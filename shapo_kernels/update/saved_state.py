"""What resuming an update needs beside the base optimizer's state: made, checked, loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..ops._checks import check_choice, check_whole
from ..ops.subspace_update import NORMS
from ..perturbation import StochasticRounding
from .radius import Radius, check_draws, check_norm, checked_rho
from .stats import UpdateStats

_VERSION = 1
_NAMES = frozenset({"updates", "rho", "relative", "interval", "norm", "draws", "skipped"})


def make_state(
    updates: int, interval: int, radius: Radius, rounding: StochasticRounding | None, stats: UpdateStats
) -> dict[str, Any]:
    """The same on every rank."""
    return {
        "version": _VERSION,
        "updates": updates,
        "rho": radius.rho,
        "relative": radius.relative,
        "interval": interval,
        "norm": radius.norm,
        "draws": radius.draws_state(),
        "roundings": rounding.draws if rounding is not None else 0,
        **stats.state(),
    }


def check_state(
    state: Any, radius: Radius, *, quantised: bool, groups: Iterable[Mapping[str, Any]] | None = None
) -> None:
    """Raises ValueError where a state is damaged, of another version, or does not fit; it changes nothing.

    Args:
        radius: that the state will be loaded into.
        quantised: whether a selected weight is, whose norm is unknown.
        groups: the param groups whose own radii will be in force; those in force now where there are none.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the state is a {type(state).__name__}: expected what opt.shapo_state_dict() gave")
    version = state.get("version")
    if not isinstance(version, int) or version != _VERSION:
        raise ValueError(f"the state is of version {version!r}: expected {_VERSION}")
    if missing := _NAMES - set(state):
        raise ValueError(f"the state has no {sorted(missing)[0]!r}: it is damaged")
    relative, norm = state["relative"], state["norm"]
    check_choice("the state's norm", norm, NORMS)
    if not isinstance(relative, bool):
        raise ValueError(f"the state's relative is {relative!r}: expected True or False")
    for name, least in (("interval", 1), ("updates", 0), ("skipped", 0)):
        check_whole(f"the state's {name}", state[name], least=least)
    check_whole("the state's roundings", state.get("roundings", 0), least=0)
    checked_rho(state["rho"], norm)
    for group in radius.groups if groups is None else groups:
        radius.check_group(group, norm)
    check_norm(norm, relative=relative)
    if relative and quantised:
        raise ValueError("the state has relative=True, and a selected weight is quantised: its norm is unknown")
    check_draws(state["draws"])


def load_state(
    state: Mapping[str, Any], radius: Radius, rounding: StochasticRounding | None, stats: UpdateStats
) -> None:
    """Puts a checked state's radius, draws and counters in place; its updates and interval are the optimizer's."""
    radius.relative, radius.norm = state["relative"], state["norm"]
    radius.rho = state["rho"]
    radius.load_draws(state["draws"])
    if rounding is not None:
        rounding.draws = state.get("roundings", 0)
    stats.load(dict(state))
