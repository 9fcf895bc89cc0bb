"""The random state of an update's start, for its second pass: dropout must agree in both.

Otherwise eps climbs another function than the one that is perturbed along it.
"""

from __future__ import annotations

import torch


class RandomState:
    """The random state of the CPU and of one device, to come back to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
