"""Every operator in Triton: compiled for the GPU at hand when first launched; interpreted on the CPU, for tests.

The functions carry the names and positional arguments of the schemas in ``csrc/register.cpp``; what they compute is
documented once, at the public functions of :mod:`shapo_kernels.ops`. Configurations are chosen from shapes and dtypes
in plain Python and never by timing, so that a result does not depend on what was measured.
"""

from ..ops.neuron_update import fake_neuron_gradient, fake_neuron_update
from ..ops.sequence_logps import fake_token_logps, fake_token_logps_gradient, fake_token_logps_gradient_
from . import neuron_update as _neuron_update
from . import sequence_logps as _sequence_logps
from .column_cosine import column_cosine
from .registration import opaque
from .subspace_update import (
    gather_into,
    norms_and_scale,
    perturb_,
    perturbation_scale,
    restore_,
    selected_squared_norms,
    squared_norms,
)

neuron_gradient = opaque(_neuron_update.neuron_gradient, fake_neuron_gradient)
neuron_update = opaque(_neuron_update.neuron_update, fake_neuron_update)
token_logps = opaque(_sequence_logps.token_logps, fake_token_logps)
token_logps_gradient = opaque(_sequence_logps.token_logps_gradient, fake_token_logps_gradient)
token_logps_gradient_ = opaque(
    _sequence_logps.token_logps_gradient_, fake_token_logps_gradient_, mutates_args=("logits",)
)

__all__ = [
    "column_cosine",
    "gather_into",
    "neuron_gradient",
    "neuron_update",
    "norms_and_scale",
    "perturb_",
    "perturbation_scale",
    "restore_",
    "selected_squared_norms",
    "squared_norms",
    "token_logps",
    "token_logps_gradient",
    "token_logps_gradient_",
]
