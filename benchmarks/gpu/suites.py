"""Every suite of timings, in the order in which they are run, and what each needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench


@dataclass(frozen=True)
class Suite:
    """`name` is a function of `module`, which is imported in the suite's own process.

    `needs`: the families of checks that must have passed. `limit` and `least` as a step's, in seconds. `later`:
    whether some of its variants are timed in the second half.
    """

    module: str
    name: str
    needs: tuple[str, ...]
    limit: float = 40.0
    least: float = 10.0
    later: bool = True

    def function(self) -> Callable[[Bench], None]:
        return getattr(importlib.import_module(f"benchmarks.gpu.{self.module}"), self.name)


_MODEL = ("subspace", "neurons", "logps", "updates")
SUITES = (
    Suite("subspace", "subspace_update", ("subspace",)),
    Suite("updates", "whole_updates", (*_MODEL, "head"), limit=110, least=20, later=False),
    Suite("neurons", "neuron_operators", ("neurons",)),
    Suite("logps", "linear_sequence_logps", ("logps", "head")),
    Suite("logps", "sequence_logps", ("logps",)),
    Suite("model", "delta_forward", ("subspace", "neurons", "updates"), later=False),
    Suite("cosine", "column_cosine", ("cosine",), limit=25),
)
# Slow for what they do through the host: last, and two rounds of each.
THROUGH_THE_HOST = Suite("subspace", "through_the_host", ("subspace",), limit=40, least=15, later=False)
PUBLISHED = Suite("updates", "published_updates", _MODEL, limit=40, least=20, later=False)
