"""Undocumented parts of transformers' Trainer.

Without any of `TRAINER` an update would be another than it seems, so a trainer that lacks one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shapo.libraries import lacking

TRAINER = {
    "get_batch_samples": "fetches all micro-batches of an update before the first forward pass",
    "compute_loss_context_manager": "the autocast that a forward pass runs under",
    "_prepare_inputs": "puts a micro-batch on the device",
    "_get_num_items_in_batch": "counts what a loss over some micro-batches is divided by",
    "_save_optimizer_and_scheduler": "is called with a checkpoint's folder whenever one is written",
    "_load_optimizer_and_scheduler": "is called with a checkpoint's folder, or None, when training begins",
}
"""Name -> what is assumed of it."""


def check_trainer(trainer: Any) -> None:
    """Raises ValueError where the installed transformers has not what the mixin builds on."""
    missing = lacking(type(trainer), TRAINER)
    if missing:
        raise ValueError(
            f"the Trainer of this transformers has no {', '.join(missing)}, which ShaPO's two passes need: "
            "install a release from 4.56 to 5.24"
        )


def prepare_inputs(trainer: Any, inputs: Any) -> dict[str, Any]:
    """A copy of a micro-batch on the trainer's device."""
    prepared: dict[str, Any] = trainer._prepare_inputs(dict(inputs))
    return prepared


def count_items(trainer: Any, batches: Sequence[Any]) -> Any:
    """What the trainer divides a loss over `batches` by; None where it takes means."""
    return trainer._get_num_items_in_batch(list(batches), trainer.args.device)


def is_scaled(trainer: Any, items: Any) -> bool:
    """Whether the loss comes divided for the whole update already, by the model or by `compute_loss_func`."""
    known = getattr(trainer, "loss_is_scaled_for_ga", None)  # since transformers 5.3
    if known is not None:
        return bool(known)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
