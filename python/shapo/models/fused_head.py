"""The fused head: log-probabilities of responses from a language model's last hidden states, without its logits.

What a model does between its last hidden states and its logits is found out by asking it: once, with a stand-in for the
output embedding that gives numbers whose logits then tell the scale and the soft cap. A model that does anything else
there (a bias of its own, an adapter on the head, a quantised head) keeps its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from shapo.errors import UserError
from shapo.libraries.torch import has_hooks, is_sharded_alone
from shapo.models.modes import evaluating
from shapo.models.wrappers import unwrap
from shapo_kernels import losses

# Of the stand-in: 1 tells the scale, the largest the soft cap, and all of them whether that was all.
_PROBES = (-37.0, -2.5, -0.125, 0.0, 0.25, 1.0, 4.0, 55.0, 1e6)


class _Output(NamedTuple):
    """What a model puts out under the fused head; hooks on the model see it, and logits of no vocabulary."""

    found: tuple[Tensor, ...]
    logits: Tensor


@dataclass(frozen=True)
class FusedHead:
    """How a model's logits follow from its output embedding: `cap((W h + b) * scale)`; see `linear_sequence_logps`."""

    scale: float
    softcap: float | None

    def sequence_logps(self, model: nn.Module, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """As `losses.sequence_logps`, by a forward pass through `model` and whatever is wrapped around it."""
        sums, counts = self._through(model, losses.linear_sequence_logps, inputs, labels=labels)
        return sums, counts

    def preference_loss(
        self, model: nn.Module, labels: Tensor, share: Callable[..., Tensor], **inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `losses.linear_preference_loss`, likewise."""
        loss, sums, counts = self._through(model, losses.linear_preference_loss, inputs, labels=labels, share=share)
        return loss, sums, counts

    def _through(
        self, model: nn.Module, function: Callable[..., tuple[Tensor, ...]], inputs: Any, *, labels: Tensor, **more: Any
    ) -> tuple[Tensor, ...]:
        inner = unwrap(model, for_calls=True)

        def forward(*args: Any, **kwargs: Any) -> _Output:
            hidden = inner.base_model(*args, **kwargs).last_hidden_state
            found = function(hidden, labels=labels.to(hidden.device), **more, **self.options(inner))
            return _Output(found, hidden.new_empty(*hidden.shape[:2], 0))

        with _forward_of(inner, forward):
            output: _Output = model(**inputs)
        return output.found

    def options(self, model: Any) -> dict[str, Any]:
        """The arguments of `losses.linear_sequence_logps` that are the model's own."""
        head = model.get_output_embeddings()
        return {"weight": head.weight, "bias": head.bias, "softcap": self.softcap, "scale": self.scale}


def find_fused_head(model: nn.Module, choice: str = "auto") -> FusedHead | None:
    """The model's fused head, or None for "off" and for a model that has none.

    Raises:
        UserError: For "on", where the model has none: the reason.
    """
    if choice == "off":
        return None
    found = describe_head(model)
    if isinstance(found, FusedHead):
        return found
    if choice == "on":
        raise UserError(f"the fused head cannot serve this model, because {found}; choose auto or off")
    return None


def describe_head(model: nn.Module) -> FusedHead | str:
    """The model's fused head, or why it has none."""
    inner = unwrap(model, for_calls=True)
    if not all(hasattr(inner, name) for name in ("base_model", "get_output_embeddings", "config")):
        return f"{type(inner).__name__} is no language model of transformers"
    if inner.base_model is inner or getattr(inner.config, "is_encoder_decoder", False):
        return f"{type(inner).__name__} is no decoder with a head"
    if (reason := unusable(inner)) is not None:
        return reason
    try:
        return _ask(inner, model)
    except Exception as error:  # whatever a model's forward pass says to a stand-in for its head
        return f"its forward pass does not take a stand-in for its head ({type(error).__name__})"


def unusable(model: Any) -> str | None:
    """Why a model's head cannot be left out at this moment; None where it can.

    A hook on the head, such as the perturbation's in a subspace that includes it, would not be called.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return f"its head is a {type(head).__name__}, not a plain linear layer"
    # With others, as Accelerate shards it with the last norm, it is gathered for their call.
    if is_sharded_alone(head):
        return "FSDP2 shards its head by itself, and gathers it for a call of its own only"
    if has_hooks(head):
        return "its head has hooks, which would not be called"
    return None


def _ask(model: Any, wrapped: Any) -> FusedHead | str:
    """One forward pass over two tokens, its head replaced, and one of the backbone alone; hooks on both see nothing.

    FSDP2 gathers weights by hooks of the outermost module: a model that it shards is asked through them, by all ranks.
    """
    head = model.get_output_embeddings()
    sharded = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    taken: list[Tensor] = []
    theirs, backbone = model.forward, model.base_model if sharded else model.base_model.forward

    def stand_in(hidden: Tensor) -> Tensor:
        taken.append(hidden)
        return torch.tensor(_PROBES, device=hidden.device).expand(*hidden.shape[:-1], -1).clone()

    def both(**inputs: Any) -> tuple[Tensor, Tensor]:
        with _forward_of(head, stand_in):
            logits = theirs(**inputs).logits
        return logits, backbone(**inputs).last_hidden_state

    try:
        with evaluating(model), torch.no_grad(), _forward_of(model, both):
            logits, hidden = (wrapped if sharded else both)(input_ids=tokens, use_cache=False)
    finally:
        for module in sharded:
            module.reshard()  # the outermost would keep its weights, and not see the next step's
    if len(taken) != 1 or not torch.allclose(taken[0], hidden, rtol=1e-3, atol=1e-5):
        return "its head is not given the last hidden states"
    found = logits.double()[0, -1].tolist()
    if len(found) != len(_PROBES) or not torch.equal(logits[0, 0], logits[0, 1]):
        return "its forward pass changes the logits by more than a scale and a soft cap"
    one, most = found[_PROBES.index(1.0)], found[-1]
    linear = math.isclose(most, one * _PROBES[-1], rel_tol=1e-4)
    softcap = None if linear else most
    if softcap is not None and not abs(one) < softcap < math.inf:
        return "its forward pass changes the logits by more than a scale and a soft cap"
    scale = one if softcap is None else softcap * math.atanh(one / softcap)
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-5) else scale
    for probe, value in zip(_PROBES, found, strict=True):
        expected = scale * probe if softcap is None else softcap * math.tanh(scale * probe / softcap)
        if not math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-6) or scale <= 0:
            return "its forward pass changes the logits by more than a scale and a soft cap"
    return FusedHead(scale, softcap)


@contextmanager
def _forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module's forward pass is another one; hooks and wrappers around it stay."""
    earlier = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier
