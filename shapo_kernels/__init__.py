"""Kernels and an optimizer wrapper for ShaPO, sharpness-aware preference optimisation in a small subspace.

ShaPO (arXiv:2602.07340) minimises a preference loss at weights that are moved along its gradient, inside a small
alignment-critical subspace only:  min L(theta + eps),  eps = rho * g_S / (||g_S||_2 + eta).

This package needs torch alone. The method around it (probe, selection, training, evaluation, command line) is
`shapo`.
"""

from . import backends, losses, ops
from .errors import SubspaceError
from .model.batch_norm import frozen_batch_norm
from .optimizer import ShaPOOptimizer
from .subspace import Subspace
from .update.phase import Phase, PhaseError
from .update.random_state import RandomState

__version__ = "0.1.0"

__all__ = [
    "Phase",
    "PhaseError",
    "RandomState",
    "ShaPOOptimizer",
    "Subspace",
    "SubspaceError",
    "__version__",
    "backends",
    "frozen_batch_norm",
    "losses",
    "ops",
]
