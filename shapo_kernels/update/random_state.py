"""The random state at the start of pass 1, for pass 2: with other dropout masks eps would fit another function."""

from __future__ import annotations

import torch
from torch import nn


class RandomState:
    """torch's random state at this moment, of the CPU and of the GPUs given.

    Args:
        where: a device, or a model: the devices of its parameters.
    """

    def __init__(self, where: torch.device | str | nn.Module) -> None:
        devices = {p.device for p in where.parameters()} if isinstance(where, nn.Module) else {torch.device(where)}
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def restore(self) -> None:
        """Goes back to that state: what was drawn since is drawn again."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)

    def same_as(self, other: RandomState) -> bool:
        """Whether the next draws are the same."""
        return torch.equal(self._cpu, other._cpu) and all(
            torch.equal(state, other._cuda[device]) for device, state in self._cuda.items()
        )
