"""Undocumented parts of torch."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import DistError
from torch.distributed.fsdp import FSDPModule

MODULE = {
    "_forward_hooks": "id -> hook that a call of the module runs behind it",
    "_forward_pre_hooks": "id -> hook that a call of the module runs before it",
}
FSDP2 = {"_get_fsdp_state": "state of a sharded module; its _modules are those that are gathered together"}


def is_sharded_alone(module: nn.Module) -> bool:
    """Whether FSDP2 gathers this module by itself, for a call of its own."""
    if not isinstance(module, FSDPModule):
        return False
    state: Any = module._get_fsdp_state()
    # Where a release says it otherwise: as if alone, so that nobody takes it for gathered.
    return len(getattr(state, "_modules", (module,))) == 1


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks besides FSDP2's."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not hook.__module__.startswith("torch.distributed.fsdp.") for hook in hooks)


# What gloo and NCCL say where a rank is gone; only NCCL's errors have a class of their own.
_OF_LOST_RANKS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL")


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error is that of a collective from which another rank has gone."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_LOST_RANKS)
