"""How much of the base optimizer's step arrives in 16-bit weights.

A weight w of bfloat16 has neighbours at a distance of 2^-8 to 2^-7 of |w|, and an update below half of that leaves it
where it was. At the learning rates of preference optimisation most elements never move, and no loss tells so. The share
that moves is therefore measured in the first updates at the full learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shapo_kernels.errors import warn
from shapo_kernels.interop.sharding import local_part

UPDATES = 5

MOVED_WARNING = 0.5
"""Below this share a run loses more than a quarter of what it would learn with fp32 weights. Measured by `python -m
benchmarks.base_rounding`: 40 % moved kept 0.50 of the decrease of the loss, 59 % kept 0.83, 78 % kept 0.97.
"""

_SAMPLES = 16384  # elements of each tensor that are looked at: a standard error of at most 0.004


class StepRounding:
    """Measures the share of the elements that a step moves, among those with a gradient.

    Args:
        parameters: The model's. Only 16-bit ones that take a gradient are looked at; without any nothing is measured.
            Of sharded ones the part on this rank is looked at.
        scheduler: Its `last_epoch` is the number of updates made, which resumes with a run; for `step` alone.
        warmup: Updates with a lower learning rate, which are waited for.
        total: Updates of the run.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        *,
        warmup: int,
        total: int,
    ) -> None:
        halves = (torch.bfloat16, torch.float16)
        self._parameters = [p for p in parameters if p.requires_grad and p.dtype in halves]
        self._scheduler = scheduler
        first = max(0, min(warmup, total - UPDATES))
        self._measured = range(first, min(first + UPDATES, total))
        self._shares: list[float] = []
        self._before: list[tuple[torch.nn.Parameter, Tensor, Tensor]] = []
        self._done = 0

    def step(self, optimizer: Any) -> dict[str, float]:
        """`optimizer.step()` between `before` and `after`."""
        assert self._scheduler is not None
        self.before(self._scheduler.last_epoch)
        optimizer.step()
        return self.after()

    def before(self, done: int) -> None:
        """To be called when the gradients are complete, after `done` updates."""
        self._done, self._before = done, []
        if done in self._measured:
            given = [p for p in self._parameters if p.grad is not None and local_part(p).numel()]
            self._before = [(p, _sample(p), _sample(p.grad) != 0) for p in given]

    def after(self) -> dict[str, float]:
        """Once the step is made: in the first updates `moved`, the share to log. Warns once, after the last of them."""
        if not self._before:
            return {}
        moved, asked = 0.0, 0.0
        for parameter, old, meant in self._before:
            each = local_part(parameter).numel() / len(old)
            moved += each * float(((_sample(parameter) != old) & meant).sum())
            asked += each * float(meant.sum())
        self._before = []
        self._shares.append(moved / asked if asked else 1.0)
        if self._done == self._measured[-1]:
            self._warn(sum(self._shares) / len(self._shares))
        return {"moved": self._shares[-1]}

    def _warn(self, share: float) -> None:
        if share < MOVED_WARNING:
            dtype = str(self._parameters[0].dtype).removeprefix("torch.")
            warn(
                f"an update moves {100 * share:.1f} % of the elements of the {dtype} weights; the rest of the step is "
                "lost to rounding. Keep the weights in float32 (with bf16 arithmetic where it is to be fast), or raise "
                "the learning rate"
            )


def _sample(tensor: Tensor | None) -> Tensor:
    """The same elements of every tensor of a size, copied. Drawn, since equal distances would see some columns only."""
    assert tensor is not None
    flat = local_part(tensor.detach()).reshape(-1)
    if flat.numel() <= _SAMPLES:
        return flat.clone()
    drawn = torch.randint(flat.numel(), (_SAMPLES,), generator=torch.Generator().manual_seed(0))
    return flat[drawn.to(flat.device)]
