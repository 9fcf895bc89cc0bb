"""Undocumented parts of accelerate."""

from __future__ import annotations

from typing import Any

OPTIMIZER = {"optimizer": "of an AcceleratedOptimizer: the optimizer inside"}
ACCELERATOR = {"scaler": "the GradScaler of fp16 training, else None"}


def beneath(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper; any other as it is."""
    wrapped = type(optimizer).__name__ == "AcceleratedOptimizer"
    return getattr(optimizer, "optimizer", optimizer) if wrapped else optimizer


def scaler_of(trainer: Any) -> Any:
    """The GradScaler that a trainer's losses are scaled by, or None."""
    return getattr(trainer.accelerator, "scaler", None)


def zero_stage(trainer: Any) -> int:
    """The ZeRO stage that a trainer runs under; 0 without DeepSpeed."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return 0 if plugin is None else int(plugin.zero_stage)
