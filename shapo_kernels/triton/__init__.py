"""Operators in Triton: compiled for the GPU at hand when first launched; interpreted on the CPU, for tests.

The functions carry the names and positional arguments of the schemas in `ops/_schemas.py`; what they compute is
documented once, at the public functions of :mod:`shapo_kernels.ops`. Configurations are chosen from shapes and dtypes
in plain Python and never by timing, so that a result does not depend on what was measured. What is missing here the
reference serves.
"""

from . import sequence_logps as _sequence_logps
from .linear_tile import linear_tile
from .registration import opaque
from .subspace_update import (
    gather_into,
    perturb_,
    perturbation_scale,
    restore_,
    selected_squared_norms,
    squared_norms,
)

token_logps = opaque(_sequence_logps.token_logps)
token_logps_gradient = opaque(_sequence_logps.token_logps_gradient)
token_logps_gradient_ = opaque(_sequence_logps.token_logps_gradient_)

__all__ = [
    "gather_into",
    "linear_tile",
    "perturb_",
    "perturbation_scale",
    "restore_",
    "selected_squared_norms",
    "squared_norms",
    "token_logps",
    "token_logps_gradient",
    "token_logps_gradient_",
]
