"""Undocumented parts of accelerate."""

from __future__ import annotations

import importlib.util
import logging
import os
from datetime import timedelta
from typing import Any

from shapo.errors import UserError

OPTIMIZER = {"optimizer": "of an AcceleratedOptimizer: the optimizer inside"}
ACCELERATOR = {"scaler": "the GradScaler of fp16 training, else None"}
STATE = {"_shared_state": "of PartialState: a dict; every later state takes its distributed_type from it"}


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


def join(*, cpu: bool, timeout: timedelta) -> None:
    """Joins the ranks that a launcher has started, by its environment: NCCL on GPUs, gloo on CPUs.

    Accelerate takes DeepSpeed and FSDP for devices other than the CPU only. Told that the CPU is one, all of its own
    code runs over gloo.

    Raises:
        UserError: DeepSpeed is asked for and not installed.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # transformers would load no weights on other ranks than 0: of reward models neither, which every rank needs.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    by_deepspeed = wanted_engine() == "DeepSpeed"
    if by_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError("the Accelerate config asks for DeepSpeed, which is not installed: pip install deepspeed")
    if cpu and by_deepspeed:
        _use_deepspeed_on_a_cpu()
        PartialState(backend="gloo", timeout=timeout)
    else:
        PartialState(cpu=cpu, timeout=timeout)
    if cpu and _wanted("ACCELERATE_USE_FSDP"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def make_accelerator(*, micro_batch_size: int, clip: float, bf16_weights: bool) -> Any:
    """An Accelerator as the launcher's environment wants it. Accumulation, precision and devices are the loop's own.

    Args:
        micro_batch_size: of a rank, which DeepSpeed wants to be told.
        clip: largest norm of a gradient, 0 for none; DeepSpeed clips by itself.
        bf16_weights: whether the model's weights are bf16; DeepSpeed then steps fp32 copies of them.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DeepSpeedPlugin

    plugin = None
    if _wanted("ACCELERATE_USE_DEEPSPEED"):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer but Adam
        plugin = DeepSpeedPlugin(gradient_accumulation_steps=1, gradient_clipping=clip, zero3_init_flag=False)
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip,
            "bf16": {"enabled": bf16_weights},
        }
        plugin.deepspeed_config.pop("train_batch_size", None)
    return Accelerator(
        device_placement=False,
        mixed_precision="no",
        deepspeed_plugin=plugin,
        # The ranks have the same buffers, and run as many passes under no_grad as suits them.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def wanted_engine() -> str | None:
    """What the launcher's environment asks for beside DDP: "DeepSpeed", "FSDP" or None."""
    if _wanted("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return "FSDP" if _wanted("ACCELERATE_USE_FSDP") else None


def wanted_precision() -> str:
    """The `mixed_precision` that the launcher's environment asks for."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def shards_weights() -> bool:
    """Whether the launcher's environment asks for FSDP or ZeRO-3."""
    by_deepspeed = _wanted("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return by_deepspeed or _wanted("ACCELERATE_USE_FSDP")


def _wanted(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _use_deepspeed_on_a_cpu() -> None:
    """Without the collectives in shared memory that it would compile when they are first needed; gloo's do as well."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # type: ignore[import-untyped]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
