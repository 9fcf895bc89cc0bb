"""An option of trl's trainers: per-token log-probabilities by `losses.linear_token_logps`, not by trl's own head.

trl's trainers ask their model for log-probabilities by `model(..., labels=labels, fused_lm_head=True)` and take from
the answer the losses' log-probabilities and the metrics' entropy, mean logit and top-1 accuracy. That one call is
answered here; every `loss_type` and every metric stays trl's.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from shapo.errors import UserError
from shapo.libraries import trl
from shapo.libraries.accelerate import zero_stage
from shapo.models.fused_head import FusedHead, find_fused_head, unusable
from shapo.models.wrappers import unwrap
from shapo_kernels import losses

from .rounding import RoundingMixin


class FusedHeadMixin(RoundingMixin):
    """Put before a trainer of trl in a class's bases; takes one more keyword, `fused_head`.

    `"off"` (by default) leaves trl's head, `"auto"` replaces it where the model and the options allow it, `"on"`
    raises where they do not. Reference log-probabilities are made the same way as the policy's.

    Raises:
        ValueError: another `fused_head`; `"on"` with a trainer or a model that it cannot serve, with the reason.
    """

    def __init__(self, *args: Any, fused_head: str = "off", **kwargs: Any) -> None:
        if fused_head not in ("auto", "on", "off"):
            raise ValueError(f"fused_head is {fused_head!r}: expected 'auto', 'on' or 'off'")
        self._fused_head = fused_head
        super().__init__(*args, **kwargs)
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is not None:
                self._install(model)

    def compute_ref_log_probs(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Called while the trainer is made too, when the reference's numbers are computed beforehand.
        self._install(model)
        return super().compute_ref_log_probs(model, *args, **kwargs)  # type: ignore[misc]

    def _install(self, model: nn.Module) -> None:
        if self._fused_head == "off" or _is_answered(unwrap(model, for_calls=True)):
            return
        reason = self._refusal(model)
        if reason is None:
            try:
                head = find_fused_head(model, self._fused_head)
            except UserError as error:
                raise ValueError(str(error)) from None
            if head is not None:
                _answer(unwrap(model, for_calls=True), head, required=self._fused_head == "on")
        elif self._fused_head == "on":
            raise ValueError(f"fused_head='on' cannot serve this trainer, because {reason}: use 'auto' or 'off'")

    def _refusal(self, model: nn.Module) -> str | None:
        if zero_stage(self) == 3:
            return "ZeRO-3 gathers a head for a call of its own only"
        if not trl.asks_for_logps(unwrap(model, for_calls=True)):
            return "it does not ask its model for log-probabilities by trl's fused_lm_head"
        if getattr(self, "use_weighting", False):
            return "use_weighting needs log(sum p^2) of every token"
        config = unwrap(model, for_calls=True).config
        if getattr(self, "aux_loss_enabled", False) or getattr(config, "output_router_logits", False):
            return "a mixture of experts adds a loss of its router"
        return None


def _is_answered(model: Any) -> bool:
    return hasattr(model.__dict__.get("forward"), "shapo_fused_head")


def _answer(model: Any, head: FusedHead, *, required: bool) -> None:
    """From now on the model answers `fused_lm_head=True` by `head`, and all other calls as before.

    Args:
        required: raise where the model has become one that `head` cannot serve, by an engine that shards it.
    """
    theirs = model.forward

    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        reason = unusable(self) if fused_lm_head else None
        if required and reason is not None:
            raise ValueError(f"fused_head='on' cannot serve this model, because {reason}: use 'auto' or 'off'")
        if not fused_lm_head or reason is not None:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return theirs(*args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        # As trl has them: labels beside the hidden states that predict them.
        shift = 1 if shift_labels is None else 0
        beside: Any = labels if shift_labels is None else shift_labels
        found = losses.linear_token_logps(
            hidden, labels=beside.to(hidden.device), shift=shift, statistics=True, **head.options(self)
        )
        logps, entropy, mean_logit, is_top = (value[:, : value.shape[1] - shift] for value in found)  # type: ignore[index, union-attr]
        mask = beside[:, shift:] != -100
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return trl.fused_output(
            loss=-logps.sum() / count,
            log_probs=logps,
            entropy=entropy,
            mean_logits=mean_logit,
            is_top1=is_top,
            label_mask=mask,
        )

    # `generate` validates its arguments against the signature, which is the model's own.
    forward.__wrapped__ = getattr(theirs, "__wrapped__", theirs)  # type: ignore[attr-defined]
    forward.shapo_fused_head = head  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
