"""Where the MLP value vectors of each supported architecture are: the one table that selection reads.

A *neuron* is one value vector: column i of a down projection `[hidden, intermediate]` (`nn.Linear`, axis 1) or row i
of a GPT-2 `Conv1D` weight `[intermediate, hidden]` (axis 0). To support another architecture, add a line to
`ARCHITECTURES`. Mixtures of experts are not supported: their experts are one three-dimensional parameter or are used by
a part of the tokens only, for which a score over all layers together has no meaning yet.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from shapo.errors import UserError
from shapo.models.wrappers import unwrap
from shapo_kernels.interop.names import plain_name

__all__ = ["ARCHITECTURES", "Architecture", "ValueVectors", "learned_positions", "value_vectors"]


@dataclass(frozen=True)
class Architecture:
    """The modules that hold value vectors, as a pattern of their full plain names, and their weight's neuron axis."""

    modules: str
    axis: int


_GATED = Architecture(r"(?:.*\.)?layers\.\d+\.mlp\.down_proj", axis=1)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": Architecture(r"(?:.*\.)?language_model\.(?:.*\.)?layers\.\d+\.mlp\.down_proj", axis=1),
    "gemma3_text": _GATED,
    "phi3": _GATED,
    "gpt_neox": Architecture(r"(?:.*\.)?layers\.\d+\.mlp\.dense_4h_to_h", axis=1),
    "gpt2": Architecture(r"(?:.*\.)?h\.\d+\.mlp\.c_proj", axis=0),
}

_EXPERT_SETTINGS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ValueVectors:
    """The value-vector weights of one model, in the order of its layers.

    Attributes:
        names: parameter names of the unwrapped model, as a `Subspace` takes them.
        axis: the axis of each weight that counts neurons.
        sizes: name -> number of neurons.
        hidden_size: length of a value vector.
        weights: name -> the parameter itself (of a quantised layer: packed, not of shape `[hidden, intermediate]`).
        model_type: the configuration's `model_type`.
    """

    names: tuple[str, ...]
    axis: int
    sizes: dict[str, int]
    hidden_size: int
    weights: dict[str, nn.Parameter]
    model_type: str

    def upper(self, depth: float) -> ValueVectors:
        """Those of the upper share `depth` of the layers, rounded up to whole ones.

        Raises:
            UserError: a share outside (0, 1].
        """
        if not 0 < depth <= 1:
            raise UserError(f"depth is {depth}; expected a share of the layers, above 0, up to 1")
        # A share like 0.1 of 30 layers is 3, whatever the last bit of the product says.
        names = self.names[-math.ceil(depth * len(self.names) - 1e-9) :]
        sizes, weights = ({name: of[name] for name in names} for of in (self.sizes, self.weights))
        return replace(self, names=names, sizes=sizes, weights=weights)  # type: ignore[arg-type]


def value_vectors(model: nn.Module) -> ValueVectors:
    """Find the value vectors of `model`, seen through DDP, FSDP, torch.compile and PEFT wrappers.

    Raises:
        UserError: an architecture that is not supported (mixtures of experts included), or a model of a supported type
            without the modules that the type promises.
    """
    inner = unwrap(model)
    model_type = str(getattr(getattr(inner, "config", None), "model_type", "") or type(inner).__name__)
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UserError(_unsupported(inner, model_type))
    pattern = re.compile(architecture.modules)
    weights: dict[str, nn.Parameter] = {}
    sizes: dict[str, int] = {}
    widths: set[int] = set()
    for name, module in inner.named_modules():
        weight = getattr(module, "weight", None)
        plain = plain_name(name)
        if not isinstance(weight, nn.Parameter) or not pattern.fullmatch(plain):
            continue
        parameter_name = f"{plain}.weight"
        weights[parameter_name] = weight
        sizes[parameter_name], width = _shape(module, architecture.axis)
        widths.add(width)
    if not weights:
        raise UserError(
            f"no value vectors in this {model_type!r} model ({type(inner).__name__}): no module is named like "
            f"{architecture.modules!r}; expected the model as transformers builds it"
        )
    if len(widths) != 1:
        raise UserError(f"the value vectors of this {model_type!r} model have different lengths: {sorted(widths)}")
    return ValueVectors(tuple(weights), architecture.axis, sizes, widths.pop(), weights, model_type)


def _shape(module: Any, axis: int) -> tuple[int, int]:
    """(neurons, length of a value vector): from a Linear's own sizes, which stay true where its weight is packed."""
    if axis == 1 and hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    shape = module.weight.shape
    if len(shape) != 2:
        raise UserError(f"a value-vector weight has the shape {list(shape)}; expected two dimensions")
    return int(shape[axis]), int(shape[1 - axis])


def _unsupported(model: nn.Module, model_type: str) -> str:
    config = getattr(model, "config", None)
    experts = any(getattr(config, setting, None) for setting in _EXPERT_SETTINGS)
    kind = "is a mixture of experts, which is not supported" if experts else "is not supported"
    return f"model type {model_type!r} {kind}; supported types: {', '.join(ARCHITECTURES)}"


def learned_positions(model: Any) -> int | None:
    """Number of a model's learned positions; None where positions are computed."""
    learned = any(
        isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|.*position.*)$", name)
        for name, module in model.named_modules()
    )
    return getattr(model.config, "max_position_embeddings", None) if learned else None
