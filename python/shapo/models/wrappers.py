"""The model inside wrappers: DDP, DataParallel, DeepSpeed's engine, FSDP1, torch.compile and PEFT, in any nesting."""

from __future__ import annotations

from typing import Any

from torch import nn

from shapo.libraries import peft
from shapo_kernels.interop.names import COMPILED, FSDP1, REPLICATED


def unwrap(model: nn.Module, *, for_calls: bool = False) -> Any:
    """The transformers model inside.

    Args:
        model: wrapped or not.
        for_calls: stop where a call of the inner model would be another one than the wrapper's: at PEFT's virtual
            tokens, at FSDP1, which gathers weights for its own call, and at torch.compile.
    """
    seen_through = (REPLICATED,) if for_calls else (REPLICATED, COMPILED, FSDP1)
    while True:
        inner: Any = None
        if peft.is_peft(model, compiled_too=for_calls):
            if for_calls and peft.adds_tokens(model):
                return model
            wrapped: Any = model
            inner = wrapped.get_base_model()
        else:
            children = dict(model.named_children())
            inner = next((children[name] for name in seen_through if name in children), None)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
