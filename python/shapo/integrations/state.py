"""What an Accelerate loop saves of a ShaPOOptimizer where Accelerate does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shapo_kernels import ShaPOOptimizer


class ShaPOState:
    """Update counter, radius and draws of an optimizer, for `accelerator.register_for_checkpointing`.

    Under FSDP `accelerator.save_state` keeps an optimizer's state by the names of parameters and drops everything
    else; without this a resumed run would begin its interval anew. Elsewhere it is in the optimizer's own state, and
    registering it does no harm.
    """

    def __init__(self, optimizer: ShaPOOptimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.shapo_state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_shapo_state_dict(state)
