"""The base optimizers and the learning-rate schedules that the loops offer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable

import torch

from shapo.config import LoopConfig
from shapo.errors import UserError

# Name on the command line -> module and class. Those of torchao and bitsandbytes hold their states in few bits.
_CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adam": ("torch.optim", "Adam"),
    "nadam": ("torch.optim", "NAdam"),
    "radam": ("torch.optim", "RAdam"),
    "rmsprop": ("torch.optim", "RMSprop"),
    "sgd": ("torch.optim", "SGD"),
    "adagrad": ("torch.optim", "Adagrad"),
    "adafactor": ("torch.optim", "Adafactor"),
    "torchao_adamw_8bit": ("torchao.optim", "AdamW8bit"),
    "torchao_adamw_4bit": ("torchao.optim", "AdamW4bit"),
    "torchao_adamw_fp8": ("torchao.optim", "AdamWFp8"),
    "bnb_adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "bnb_paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
    "bnb_lion_8bit": ("bitsandbytes.optim", "Lion8bit"),
}


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the parameters that take a gradient, with its library's other defaults.

    Raises:
        UserError: Nothing takes a gradient, its library is not installed, or it needs a GPU and there is none.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise UserError("no weight of the model takes a gradient, so there is nothing to train")
    module, name = _CLASSES[config.optimizer]
    library = module.partition(".")[0]
    if library == "bitsandbytes" and trainable[0].device.type != "cuda":
        raise UserError(f"the optimizer {config.optimizer} needs a GPU, but the weights are on {trainable[0].device}")
    try:
        made = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(f"the optimizer {config.optimizer} needs {library}: pip install {library}") from error
    optimizer: torch.optim.Optimizer = made(trainable, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer


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


def largest_norm(clip: float) -> float:
    """What gradients are scaled down to: `clip`, where 0 is for no bound."""
    return clip if clip > 0 else math.inf
