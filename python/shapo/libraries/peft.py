"""Parts of PEFT's models that are read by name, so that peft need not be installed."""

from __future__ import annotations

from typing import Any

MODEL = {
    "get_base_model": "the transformers model inside",
    "active_peft_config": "the configuration of the adapter in use",
}
CONFIG = {"is_prompt_learning": "the adapter puts virtual tokens before a text"}


def is_peft(model: Any, *, compiled_too: bool = False) -> bool:
    """Whether a model is PEFT's wrapper, or torch.compile's around one."""
    return hasattr(model if compiled_too else type(model), "get_base_model")


def adds_tokens(model: Any) -> bool:
    """Whether positions of the output are not those of the labels."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
