"""Every suite of timings, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cosine import column_cosine
from benchmarks.gpu.logps import linear_sequence_logps, sequence_logps
from benchmarks.gpu.model import delta_forward
from benchmarks.gpu.neurons import neuron_operators
from benchmarks.gpu.subspace import subspace_update

SUITES: tuple[Callable[[Bench], None], ...] = (
    subspace_update,
    neuron_operators,
    delta_forward,
    sequence_logps,
    linear_sequence_logps,
    column_cosine,
)
