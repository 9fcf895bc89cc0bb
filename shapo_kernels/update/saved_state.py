"""What resuming an update needs beside the base optimizer's state: made, checked, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops._checks import check_choice, check_switches, check_whole
from ..ops.subspace_update import NORMS
from ..perturbation import StochasticRounding
from .radius import Radius, checked_rho
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


def check_state(state: Mapping[str, Any], *, quantised: bool) -> None:
    """Raises ValueError where a state is damaged or of another version, TypeError where a switch is none.

    Args:
        quantised: whether a selected weight is, whose norm is unknown.
    """
    if state.get("version") != _VERSION:
        raise ValueError(f"the state is of version {state.get('version')!r}: expected {_VERSION}")
    if missing := _NAMES - set(state):
        raise ValueError(f"the state has no {sorted(missing)[0]!r}: it is damaged")
    check_choice("the state's norm", state["norm"], NORMS)
    check_switches(**{"the state's relative": state["relative"]})
    for name, least in (("interval", 1), ("updates", 0)):
        check_whole(f"the state's {name}", state[name], least=least)
    checked_rho(state["rho"], state["norm"])
    if state["relative"] and quantised:
        raise ValueError("the state has relative=True, and a selected weight is quantised: its norm is unknown")


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
