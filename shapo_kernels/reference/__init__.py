"""Every operator in plain PyTorch: the slow, obvious truth that each backend is tested against.

The functions carry the names and positional arguments of the schemas in `ops/_schemas.py`; what they compute is
documented once, at the public functions of :mod:`shapo_kernels.ops`.
"""

from .column_cosine import column_cosine
from .sequence_logps import token_logps, token_logps_gradient, token_logps_gradient_
from .subspace_update import (
    gather_into,
    perturb_,
    perturbation_scale,
    restore_,
    selected_squared_norms,
    squared_norms,
)

#: The operators.
__all__ = [
    "column_cosine",
    "gather_into",
    "perturb_",
    "perturbation_scale",
    "restore_",
    "selected_squared_norms",
    "squared_norms",
    "token_logps",
    "token_logps_gradient",
    "token_logps_gradient_",
]
