"""What a trainer cannot be combined with, told in one line: before it is made where possible, else right after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shapo.libraries import trl
from shapo.libraries.transformers import check_trainer
from shapo_kernels import ShaPOOptimizer

from .arguments import ShaPOArguments


def refuse_before(shapo: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ShaPOArguments:
    """The options, looked at before the trainer is made.

    Raises:
        TypeError: they are no options, or not enough to wrap an optimizer.
        ValueError: they say again what a ready ShaPOOptimizer says.
    """
    if shapo is not None and not isinstance(shapo, ShaPOArguments):
        raise TypeError(f"shapo is a {type(shapo).__name__}: expected ShaPOArguments(subspace, rho=…)")
    values = (*args, *kwargs.values())
    pairs = [value for value in values if isinstance(value, tuple) and len(value) == 2]
    ready = any(isinstance(optimizer, ShaPOOptimizer) for optimizer, _ in pairs)
    options = shapo or ShaPOArguments()
    if ready:
        options.refuse_an_optimizers_options()
    else:
        options.require_an_optimizers_options()
    return options


def refuse_trainer(trainer: Any, shapo: ShaPOArguments) -> None:
    """Raises ValueError for a trainer, or arguments of one, under which an update would be another than it seems."""
    check_trainer(trainer)
    arguments = trainer.args
    if trainer.is_deepspeed_enabled and isinstance(trainer.optimizer, ShaPOOptimizer):
        raise ValueError(
            "DeepSpeed takes an optimizer's parameters away: give the trainer its base, optimizers=(AdamW(…), None), "
            "or none, and shapo=ShaPOArguments(subspace, rho=…)"
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs in one process would run under nn.DataParallel: launch with torchrun or "
            "`accelerate launch`, or make one GPU visible"
        )
    if trl.generates_batches(trainer):
        raise ValueError(
            "a trainer that generates its batches would generate others for the second pass: use an offline one"
        )
    if trl.asks_reference_in_each_pass(trainer):
        raise ValueError(
            "the reference model would run in both passes, and for an adapter's policy on perturbed weights: "
            "set precompute_ref_log_probs=True"
        )
    selective = not isinstance(trainer.optimizer, ShaPOOptimizer) and shapo.ascent == "selective"
    if selective and _checkpoints_reentrantly(arguments):
        raise ValueError(
            "reentrant checkpointing refuses the selective ascent: set use_reentrant=False in "
            "activation_checkpointing_kwargs (gradient_checkpointing_kwargs), activation_checkpointing=False (trl "
            "makes adapters' reentrant under ZeRO-3), or ascent='grad'"
        )
    reuses = trainer.optimizer.reuse_prefix if isinstance(trainer.optimizer, ShaPOOptimizer) else shapo.reuse_prefix
    if reuses and getattr(arguments, "activation_offloading", False):
        raise ValueError(
            "activation_offloading takes what the blocks below keep for the second pass away after the first: leave "
            "out reuse_prefix or activation_offloading"
        )
    micro_batches = 1 if shapo.per_micro_batch else arguments.gradient_accumulation_steps
    shapo.part(shapo.seed).require_at_most(arguments.per_device_train_batch_size * micro_batches)


def _checkpoints_reentrantly(arguments: Any) -> bool:
    # transformers 5 has a new name, and the old one beside it; trl writes to the old one where PEFT meets ZeRO-3.
    return any(
        getattr(arguments, name, False)
        and (getattr(arguments, f"{name}_kwargs", None) or {}).get("use_reentrant", False)
        for name in ("activation_checkpointing", "gradient_checkpointing")
    )
