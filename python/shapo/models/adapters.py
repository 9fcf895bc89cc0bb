"""LoRA adapters by PEFT: put onto a model before training, and merged or kept apart when it is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapo.errors import UserError, first_line
from shapo.libraries.peft import is_peft
from shapo.storage.fingerprint import digest_tensors
from shapo_kernels import Subspace
from shapo_kernels.interop.names import parameters_by_name, plain_name

_EVERYWHERE = "all-linear"


@dataclass(frozen=True)
class Lora:
    """Settings of an adapter, arXiv:2106.09685: W x + (alpha / r) B A x, with B = 0 at the start.

    Attributes:
        r: Rank of A `[r, in]` and B `[out, r]`.
        alpha: Scale, 2 r unless given.
        dropout: Of the adapter's input.
        targets: Ends of the adapted layers' names; every linear layer but the head unless given.
    """

    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = (_EVERYWHERE,)

    @classmethod
    def parse(cls, text: str) -> Lora:
        """`r=16,alpha=32,dropout=0.05,targets=q_proj,v_proj`; each may be left out.

        Raises:
            UserError: Another name, or a value that is no number or out of range.
        """
        values: dict[str, Any] = {}
        key = None
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if equals:
                key = name
                if key not in ("r", "alpha", "dropout", "targets"):
                    raise UserError(f"--lora does not know {key!r}; {_EXPECTED}")
                if key in values:
                    raise UserError(f"--lora has {key} twice; {_EXPECTED}")
                values[key] = (value,) if key == "targets" else value
            elif key == "targets" and name:
                values[key] += (name,)
            elif part.strip() or text.strip():
                raise UserError(f"--lora has {part.strip()!r}; {_EXPECTED}")
        try:
            numbers = {name: kind(values[name]) for name, kind in _NUMBERS.items() if name in values}
            lora = cls(**{**values, **numbers})
        except ValueError as error:
            raise UserError(f"--lora is {text!r}; {_EXPECTED}") from error
        if lora.r < 1 or not 0 <= lora.dropout < 1 or not (lora.alpha is None or lora.alpha >= 1):
            raise UserError(f"--lora is {text!r}, but r and alpha of at least 1 and dropout in [0, 1) are expected")
        return lora


_NUMBERS: Mapping[str, Any] = {"r": int, "alpha": int, "dropout": float}
_EXPECTED = "r=16,alpha=32,dropout=0.05,targets=q_proj,v_proj is expected, or a part of it"


def add_lora(model: Any, lora: Lora, *, seed: int) -> Any:
    """The model with an adapter, which alone is trained; its outputs still are the model's, which is the reference.

    Args:
        model: A transformers model.
        lora: The settings.
        seed: Of A; the global random state is left as it was.

    Raises:
        UserError: peft is not installed, no layer has one of the names, or the rank is above every layer's.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("--lora needs PEFT: pip install peft") from error

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    widest = max((min(module.in_features, module.out_features) for module in linear), default=lora.r)
    if lora.r > widest:
        raise UserError(f"--lora has r={lora.r}, but no layer of the model has a rank above {widest}; give a lower one")
    targets = lora.targets[0] if lora.targets == (_EVERYWHERE,) else list(lora.targets)
    source = Path(model.config._name_or_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = peft.LoraConfig(
                r=lora.r,
                lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
            )
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"cannot put LoRA onto the model: {first_line(error)}") from error
    # Where the adapter's folder is read from, a relative path would be another one.
    if source.is_dir():
        adapted.peft_config["default"].base_model_name_or_path = str(source.resolve())
    return adapted


def adapter_identity(model: Any) -> dict[str, Any]:
    """What of an adapter decides the weights that a run ends with, beside its weights; empty without one."""
    if not is_peft(model):
        return {}
    config = model.active_peft_config.to_dict()
    shown = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
    values = {name: config[name] for name in shown if name in config}
    return {
        f"adapter.{name}": sorted(v) if isinstance(v, set) else getattr(v, "value", v) for name, v in values.items()
    }


def digest_base(model: Any) -> str:
    """`digest_model` of the model that the adapter was put onto: A is drawn anew for each seed, the base is not."""
    state = model.get_base_model().state_dict()
    return digest_tensors({plain_name(name): weight for name, weight in state.items() if "lora_" not in name})


def adapters_subspace(model: Any) -> Subspace:
    """All trainable weights of the adapter, whole: ShaPO that moves the adapters and leaves the base as it is.

    Raises:
        UserError: The model has no adapter.
    """
    if not is_peft(model):
        raise UserError("--subspace adapters needs an adapter; add one with --lora")
    weights = {name: weight for name, weight in parameters_by_name(model).items() if weight.requires_grad}
    indices = {name: torch.arange(weight.shape[0]) for name, weight in weights.items()}
    return Subspace(indices, axis=0, metadata={"method": "adapters"})


@contextmanager
def merged(model: Any) -> Iterator[tuple[Any, dict[str, Tensor] | None]]:
    """Inside, the adapter is added into the base model's weights; after that they are as they were, to the bit.

    Yields:
        The transformers model and the weights to save it with, under its own names; None for a model without an
        adapter, which is saved as it is.
    """
    if not is_peft(model):
        yield model, None
        return
    # PEFT would take the adapter out again by subtraction, which rounds: the weights are kept, beside the device.
    layers = [module for module in model.modules() if hasattr(module, "get_base_layer") and hasattr(module, "unmerge")]
    kept = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in layers]
    model.merge_adapter()
    try:
        base = model.get_base_model()
        state = base.state_dict()
        yield base, {plain_name(name): weight for name, weight in state.items() if "lora_" not in name}
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.get_base_layer().weight.copy_(weight)


__all__ = ["Lora", "adapter_identity", "adapters_subspace", "add_lora", "digest_base", "merged"]
