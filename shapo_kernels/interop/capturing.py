"""Hooks that a block runs when it is called, and would not run where its output is taken from an earlier call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .torch_private import forward_hooks, forward_pre_hooks, global_forward_hooks, global_forward_pre_hooks

# torch.distributed's: of fully_shard, which the earlier call has run, and of tensor parallelism, whose collectives are
# in the graph; torch.nn.utils': weights made of others, in the graph too.
_IN_THE_GRAPH = ("torch.distributed.", "torch.nn.utils.", "shapo_kernels.")
_CAPTURING = "transformers.utils.output_capturing"
_CAPTURING_BEFORE_5 = "transformers.utils.generic"


def foreign_hook(block: nn.Module, name: str) -> str | None:
    """Names a hook on the block, or inside it, that must see every pass; `None` where there is none.

    transformers' hooks for `output_hidden_states` and the like stay on a model once they were asked for. They count
    while something is captured: hidden states are put out again by :func:`hidden_states_hooks`, other things are not.
    """
    if global_forward_hooks() or global_forward_pre_hooks():
        return "there is a global forward hook"
    others = captured() - {"hidden_states"}
    for inner, module in block.named_modules():
        where = f"{name}.{inner}" if inner else name
        for hook in (*forward_pre_hooks(module).values(), *forward_hooks(module).values()):
            made_by = _made_by(hook)
            if made_by == _CAPTURING:
                if others:
                    return f"{sorted(others)[0]!r} is captured from {where!r}"
            elif not made_by.startswith(_IN_THE_GRAPH):
                return f"{where!r} has a forward hook ({made_by})"
        forward = module.__dict__.get("forward")
        if forward is not None and _made_by(forward) == _CAPTURING_BEFORE_5:
            return f"an output is captured from {where!r}"
    return None


def captured() -> set[str]:
    """What transformers captures in the forward pass that is under way."""
    module = sys.modules.get(_CAPTURING)
    collector = module._active_collector.get() if module is not None else None
    return {key for key in collector or () if not key.startswith("_")}


def hidden_states_hooks(block: nn.Module) -> Iterator[Callable[..., Any]]:
    """transformers' own hooks on the block, which take its output down where hidden states are asked for."""
    if captured():
        yield from (hook for hook in forward_hooks(block).values() if _made_by(hook) == _CAPTURING)


def _made_by(hook: Any) -> str:
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return getattr(hook, "__module__", None) or type(hook).__module__
