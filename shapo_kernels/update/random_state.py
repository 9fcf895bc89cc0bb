"""The random state at the start of pass 1, for pass 2: dropout must agree in both.

Otherwise eps climbs another function than the one that is perturbed along it.
"""

from __future__ import annotations

import torch
from torch import nn


class RandomState:
    """torch's random state as it is now, of the CPU and of each GPU that is named, to come back to.

    Args:
        where: a device, or a model: the devices of its parameters.
    """

    def __init__(self, where: torch.device | str | nn.Module) -> None:
        devices = {p.device for p in where.parameters()} if isinstance(where, nn.Module) else {torch.device(where)}
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def restore(self) -> None:
        """Draw from here on what was drawn from the moment this was made."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
