"""The operators: one public function each, which checks its arguments, chooses a backend and handles autograd.

`_schemas.py` lists every operator's schema and fake.

`subspace_update`: gather the selected gradient with its norm, scale, perturb in place, restore.
`neuron_update`: the forward of a perturbation that is added instead of written, and the gradient of such a direction.
`column_cosine`: the cosine of every neuron with one direction.
`sequence_logps`: log-probabilities of labels under a softmax over the vocabulary.
`linear_logps`: the same from hidden states and the head's weight, without the logits.
"""

from .column_cosine import column_cosine
from .linear_logps import TokenLogps, linear_token_logps
from .neuron_update import neuron_gradient, neuron_tap, neuron_update
from .sequence_logps import token_logps
from .subspace_update import (
    gather,
    norms_and_scale,
    perturb_,
    perturbation_scale,
    restore_,
    selected_squared_norms,
    squared_norms,
)

__all__ = [
    "TokenLogps",
    "column_cosine",
    "gather",
    "linear_token_logps",
    "neuron_gradient",
    "neuron_tap",
    "neuron_update",
    "norms_and_scale",
    "perturb_",
    "perturbation_scale",
    "restore_",
    "selected_squared_norms",
    "squared_norms",
    "token_logps",
]
