"""Undocumented parts of trl's trainers. trl itself is imported only where one of its trainers runs.

Where a name is missing: without `METRICS` there is nothing to keep apart; without `REFERENCE` the trainer's reference
is refused unless it is precomputed (`integrations.refusals`); without `FUSED` trl's own head stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

METRICS = {
    "_metrics": "mode -> name -> list of what compute_loss has seen since the last log",
    "_total_train_tokens": "number of tokens that compute_loss has seen",
}
REFERENCE = {
    "precompute_ref_logps": "whether a batch holds ref_chosen_logps and ref_rejected_logps already",
    "ref_model": "the reference model, or None where the adapter is switched off for it",
    "compute_ref_log_probs": "log-probabilities of the reference for a batch: chosen, rejected",
}
FUSED = {
    "fused_lm_head": "argument of a patched model.forward that asks for log-probabilities instead of logits",
    "use_weighting": "a loss that needs log(sum p^2) of every token",
    "aux_loss_enabled": "a loss of a mixture's router is added",
}
OF_PAIRS = ("DPOTrainer", "RewardTrainer")
"""Trainers whose collators put B chosen rows above B rejected ones."""


def is_trl(kind: type) -> bool:
    """Whether a class is one of trl's."""
    return kind.__module__.split(".")[0] == "trl"


def generates_batches(trainer: Any) -> bool:
    """Whether a trainer makes its batches anew each time it is asked: it overrides Trainer's preparation of them."""
    return any("_prepare_inputs" in vars(kind) for kind in type(trainer).__mro__ if is_trl(kind))


def asks_reference_in_each_pass(trainer: Any) -> bool:
    """Whether a reference model would answer during training, and the mixin cannot put its answers into the batches."""
    kinds = type(trainer).__mro__
    once = any(kind.__name__ == "DPOTrainer" and hasattr(kind, "compute_ref_log_probs") for kind in kinds)
    return getattr(trainer, "precompute_ref_logps", True) is False and not once


@contextmanager
def metrics_kept(trainer: Any) -> Iterator[None]:
    """Forgets what `compute_loss` counts inside."""
    kept = {name: getattr(trainer, name) for name in METRICS if hasattr(trainer, name)}
    if "_metrics" in kept:
        trainer._metrics = {mode: _emptied(values) for mode, values in kept["_metrics"].items()}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


def asks_for_logps(model: Any) -> bool:
    """Whether trl has patched this model so that it can be asked by `fused_lm_head=True`."""
    code = getattr(getattr(model.__dict__.get("forward"), "__func__", None), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames


def fused_output(**fields: Any) -> Any:
    """What a patched model answers with."""
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(**fields)


def _emptied(values: Any) -> Any:
    emptied = copy.copy(values)
    emptied.clear()
    return emptied
