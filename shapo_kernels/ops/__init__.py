"""The operators: one public function each, which validates, chooses a backend and keeps autograd's books.

``subspace_update``: gather the selected gradient with its norm, scale, perturb in place, restore.
``neuron_update``: the forward of a perturbation that is added instead of written, and the gradient of such a direction.
``column_cosine``: the cosine of every neuron with one direction.
``sequence_logps``: log-probabilities of labels under a softmax over the vocabulary.
"""

from .column_cosine import column_cosine
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
    "column_cosine",
    "gather",
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
