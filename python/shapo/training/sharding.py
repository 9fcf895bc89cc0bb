"""Shards a model that rank 0 alone has read: one weight after the other is sent, and each rank keeps its part.

No rank but 0 ever has more than its part and one whole weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from shapo.models.spread import allocated, emptied, replace_parameters


def shard_by_fsdp2(accelerator: Any, model: nn.Module) -> Any:
    """The model as Accelerate shards it, with rank 0's values (a collective).

    Args:
        model: Whole on rank 0, which gives its weights away; on the others it may be on the meta device.
    """
    weights: dict[str, Any] = dict(emptied(model))
    # Accelerate's own way of sending weights fails on a model with persistent buffers.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    # It takes a model with its optimizer only, and finds that one's weights by addresses, which these do not have.
    stand_in = torch.optim.SGD(model.parameters())
    sharded, _ = accelerator.prepare(model, stand_in)
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, strict=False
    )  # every rank has the buffers
    set_model_state_dict(sharded, weights if accelerator.is_main_process else {}, options=options)
    getattr(sharded, "tie_weights", lambda: None)()
    return sharded


def partition_by_zero3(accelerator: Any, model: nn.Module) -> None:
    """Leaves each rank its part of every weight, as ZeRO-3 has it, with rank 0's values (a collective).

    Args:
        model: Whole on rank 0; on the others it may be on the meta device.
    """
    import deepspeed  # type: ignore[import-untyped]

    config = _decided(accelerator.state.deepspeed_plugin.deepspeed_config)

    def part(weight: nn.Parameter) -> nn.Parameter:
        whole = allocated(weight, accelerator.device)
        # Sends rank 0's values, and frees what is not this rank's.
        deepspeed.zero.Init(module=nn.ParameterList([whole]), config_dict_or_path=config)
        return whole

    replace_parameters(model, part)


def _decided(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config without what Accelerate fills in later."""
    return {
        name: _decided(value) if isinstance(value, dict) else value for name, value in config.items() if value != "auto"
    }
