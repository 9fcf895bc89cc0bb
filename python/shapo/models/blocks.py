"""How a model's blocks compute in training: which attention, and whether their activations are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from shapo.errors import UserError, first_line


def set_attention(model: Any, name: str) -> None:
    """Makes a transformers model use the attention `name`.

    Raises:
        UserError: transformers has none of that name for this model, or it needs what is not here.
    """
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # ImportError, ValueError, the hub's own
        raise UserError(f"the attention {name} cannot be used: {first_line(error)}") from error
    if model.config._attn_implementation != name:
        raise UserError(f"the attention {name} cannot be used: {type(model).__name__} does not take another one")


def checkpoint_blocks(model: Any) -> None:
    """Makes each block keep its input alone and compute the rest again in the backward pass.

    transformers' own switch acts in training mode alone, in which dropout acts too; this one acts in both.

    Raises:
        UserError: transformers knows no blocks in this model.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(f"--gradient-checkpointing: transformers knows no blocks in a {type(model).__name__}")
    for block in blocks:
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputing(*arguments: Any, **more: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **more)

    return recomputing
