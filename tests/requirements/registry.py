"""The requirements' checks, and who is known to meet or to miss each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Requirement:
    """One check of one requirement.

    Args:
        number: S1 to S18.
        behaviour: in words; the check's name.
        check: takes a wrapper's class and raises AssertionError where it misses the requirement.
        missed_by: peers' wrappers that the check must catch, and what they fail with.
        met_by: peers' wrappers that must pass, ours beside them.
    """

    number: str
    behaviour: str
    check: Callable[..., None]
    missed_by: dict[Any, type[Exception]]
    met_by: tuple[Any, ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.number}-{self.behaviour}"


ALL: list[Requirement] = []


#: Where a requirement is followed further than its check goes.
MORE = {
    "S1": "test_perturbation.py, ops/test_stochastic_rounding.py",
    "S2": "test_perturbation.py",
    "S3": "test_perturbation.py",
    "S4": "update/test_radius.py, update/test_rounding_of_epsilon.py, test_perturbation.py",
    "S5": "test_perturbation.py, model/test_unusual_layers.py",
    "S6": (
        "test_optimizer.py, test_perturbation.py, "
        "model/test_others_on_the_weights.py, shapo/training/test_killed_runs.py"
    ),
    "S7": "test_optimizer.py, update/test_order_of_passes.py",
    "S8": "update/test_mixed_precision.py",
    "S9": "update/test_life_cycle.py, distributed/test_checkpoint.py, model/test_others_on_the_weights.py",
    "S10": "update/test_life_cycle.py",
    "S11": "update/test_life_cycle.py, update/test_torch_optimizers.py",
    "S12": "distributed/test_engines.py, distributed/test_refusals.py, distributed/test_deepspeed.py",
    "S13": "update/test_equivalence.py, distributed/test_accumulation.py",
    "S14": "cuda/test_gpu.py (with a device: capture, and no synchronisation), aot/test_launches.py",
    "S15": "model/test_compile.py",
    "S16": "update/test_radius.py, test_perturbation.py, test_subspace.py",
    "S17": "update/test_two_passes_alike.py",
    "S18": "test_optimizer.py",
}


def table() -> str:
    """The documented table, a row for each check."""
    rows = [(r.number, r.behaviour, [p.__name__ for p in r.missed_by], [p.__name__ for p in r.met_by]) for r in ALL] + [
        ("S12", f"two ranks equal one process: {engine}", of["missed_by"], [n for n in of["met_by"] if n != "Ours"])
        for engine, of in RANKS.items()
    ]
    rows.sort(key=lambda row: int(row[0][1:]))
    lines = ["| | check | missed by | met too by | followed further in `tests/` |", "|---|---|---|---|---|"]
    shown = None
    for number, behaviour, missed, met in rows:
        more, shown = MORE[number] if number != shown else "", number
        lines.append(f"| {number} | {behaviour.replace('_', ' ')} | {', '.join(missed)} | {', '.join(met)} | {more} |")
    return "\n".join(lines)


def requirement(number: str, *, missed_by: Any, met_by: tuple[Any, ...] = ()) -> Callable[..., Any]:
    """Register a check; `missed_by` may be a tuple of peers, who fail with an AssertionError."""
    missed = missed_by if isinstance(missed_by, dict) else dict.fromkeys(missed_by, AssertionError)

    def register(check: Callable[..., None]) -> Callable[..., None]:
        ALL.append(Requirement(number, check.__name__, check, missed, met_by))
        return check

    return register


#: S12, which takes processes of its own: engine -> wrappers by name; rows of 7 over two ranks are uneven, and
#: under the last a plain weight stands beside DTensors.
RANKS: dict[str, dict[str, tuple[str, ...]]] = {
    "ddp": {"met_by": ("Ours", "PytorchOptimizer", "RankLocalNorm"), "missed_by": ()},
    "fsdp": {"met_by": ("OursByDelta", "PytorchOptimizer"), "missed_by": ("RankLocalNorm",)},
    "fsdp_ignoring": {"met_by": ("OursByDelta",), "missed_by": ("PytorchOptimizer", "RankLocalNorm")},
}
