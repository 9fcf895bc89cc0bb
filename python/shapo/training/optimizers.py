"""The base optimizers and the learning-rate schedules that the loops offer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from shapo.config import LoopConfig
from shapo.errors import UserError


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW, RMSprop (the published recipe's) or SGD over the parameters that take a gradient, otherwise with torch's
    defaults.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(trainable, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(trainable, lr=config.lr, weight_decay=config.weight_decay)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: LoopConfig, total_updates: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from lr / warmup to lr, then constant, or linear or cosine decay towards 0 at the end."""

    def factor(update: int) -> float:
        if update < config.warmup:
            return (update + 1) / config.warmup
        done = (update - config.warmup) / max(1, total_updates - config.warmup)
        if config.schedule == "linear":
            return max(0.0, 1.0 - done)
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def require_finite(norm: torch.Tensor) -> None:
    """Raises UserError for gradients that would make every weight NaN."""
    if not norm.isfinite():
        raise UserError(
            f"the norm of the gradient is {norm.item()}: training has diverged; lower the learning rate or rho"
        )


def clip_gradients(parameters: Iterable[torch.nn.Parameter], largest: float) -> torch.Tensor:
    """Scales the gradients down to a joint norm of `largest` (0: leaves them) and returns the norm they had."""
    return torch.nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else math.inf)
