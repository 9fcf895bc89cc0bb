"""What a rank steps under ZeRO, without contents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from shapo.config import LoopConfig
from shapo.planning.tracing import GRADIENTS, STATES, Trace
from shapo.training.optimizers import largest_norm, make_optimizer


class Partition:
    """One flat float32 copy of a rank's part of the trained weights, its optimizer, and the part of the gradients.

    A gradient goes into the rank's flat part of all of them as soon as there is one, and is no longer kept whole. Stage
    2 makes that part anew in each update, stage 3 once.

    Args:
        model: Whose weights are trained.
        stage: 2 or 3.
        ranks: Number of ranks.
        loop: The optimizer and the clipping.
    """

    def __init__(self, model: nn.Module, stage: int, ranks: int, loop: LoopConfig, trace: Trace) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._elements = math.ceil(sum(parameter.numel() for parameter in trained) / ranks)
        self._dtype, self._stage, self._trace = trained[0].dtype, stage, trace
        self._clip = largest_norm(loop.clip)
        self._weights = nn.Parameter(torch.empty(self._elements))
        trace.put(self._weights, STATES)
        self._gradients = self._empty() if stage == 3 else None
        self.base: Any = make_optimizer([self._weights], loop)

    def take(self, parameter: Tensor) -> None:
        """Moves a gradient to where it is kept."""
        if self._gradients is None:
            self._gradients = self._empty()
        parameter.grad = None

    def step(self) -> None:
        """Steps the copy by its gradient, in float32 too."""
        self._weights.grad = torch.empty_like(self._weights)
        if self._stage == 2:
            self._gradients = None
        torch.nn.utils.clip_grad_norm_([self._weights], self._clip)
        self.base.step()
        self.base.zero_grad()

    def _empty(self) -> Tensor:
        made = torch.empty(self._elements, dtype=self._dtype)
        self._trace.put(made, GRADIENTS)
        return made
