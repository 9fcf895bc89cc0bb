"""A mixin that makes a ``transformers.Trainer``, or a trainer built on it as ``trl``'s are, take ShaPO updates.

    class ShaPODPOTrainer(ShaPOTrainerMixin, DPOTrainer): ...
    trainer = ShaPODPOTrainer(model, args=..., train_dataset=..., shapo=ShaPOArguments(subspace, rho=0.05))

A trainer fetches all micro-batches of an update before it trains on the first. The ascent goes over them there; the
weights then stay perturbed through the trainer's own forward and backward passes and are restored before it clips the
gradients and steps. Losses are the trainer's own ``compute_loss``: nothing of them is written again here.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shapo.random_state import RandomState
from shapo_kernels import ShaPOOptimizer

from .arguments import ShaPOArguments

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the real one comes in beside the mixin


_TWO_REFERENCE_PASSES = (
    "the reference model would run in both passes, and for an adapter's policy on perturbed weights: "
    "set precompute_ref_log_probs=True"
)


class ShaPOTrainerMixin(Trainer):
    """Put before a trainer in a class's bases; takes one more keyword, ``shapo``.

    Logged beside the trainer's numbers: ``shapo/ascent_loss`` (the loss at the weights themselves), ``shapo/gap`` (what
    the perturbation adds; ``loss`` itself is taken at the perturbed weights) and the last update's
    ``shapo/grad_norm``, ``epsilon_norm``, ``relative_radius``, ``realised_cosine``, ``skipped``. The trainer's own
    metrics are counted once: at the weights themselves where the ascent sees the whole batch.

    Raises:
        TypeError: ``shapo`` is no :class:`ShaPOArguments`.
        ValueError: a DPO trainer that would run its reference model in both passes (set
            ``precompute_ref_log_probs=True``); DeepSpeed, which keeps gradients and weights to itself.
    """

    def __init__(self, *args: Any, shapo: ShaPOArguments, **kwargs: Any) -> None:
        if not isinstance(shapo, ShaPOArguments):
            raise TypeError(f"shapo is a {type(shapo).__name__}: expected ShaPOArguments(subspace, rho=…)")
        self.shapo = shapo
        self._micro_batches: list[Any] = []
        self._position = 0
        self._ascended = False
        self._drawn_rows = torch.Generator().manual_seed(shapo.seed)
        self._ascent_losses: list[Tensor] = []
        self._gaps: list[Tensor] = []
        # Looked at first where it can be: making the trainer may load a second model for nothing.
        if any(getattr(value, "precompute_ref_log_probs", True) is False for value in (*args, *kwargs.values())):
            raise ValueError(_TWO_REFERENCE_PASSES)
        super().__init__(*args, **kwargs)
        if getattr(self, "precompute_ref_logps", True) is False:
            raise ValueError(_TWO_REFERENCE_PASSES)
        if self.is_deepspeed_enabled:
            raise ValueError("ShaPO does not run under DeepSpeed: use DDP or FSDP2")

    # -- the optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, or the one it was given, wrapped."""
        base = super().create_optimizer(*args, **kwargs)
        if not isinstance(base, ShaPOOptimizer):
            model: Any = next((m for m in (*args, kwargs.get("model")) if m is not None), self.model)
            base = self.optimizer = self.shapo.wrap(base, model)
        return base

    def _shapo_optimizer(self) -> ShaPOOptimizer:
        # Accelerate puts a wrapper of its own around it.
        found = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(found, ShaPOOptimizer):
            raise RuntimeError("the trainer's optimizer is no ShaPOOptimizer: leave create_optimizer to the mixin")
        return found

    # -- an update

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._micro_batches, self._position = batches, 0
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        optimizer = self._shapo_optimizer()
        if self._position == 0:
            optimizer.model = model  # wrapped by now, where it is going to be
            optimizer.rho = self.shapo.rho if optimizer.updates >= self.shapo.plain_updates else 0.0
            self._ascended = optimizer.due
            if self._ascended:
                self._ascend(optimizer, model, num_items_in_batch)
        counted = self._ascended and self.shapo.ascent_fraction == 1
        with self._metrics_as_they_are() if counted else contextlib.nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
        if self._ascended:
            self._gaps[-1] = self._gaps[-1] + loss.detach()
        self._position += 1
        if self._position == len(self._micro_batches):
            optimizer.restore()
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if isinstance(getattr(self.optimizer, "optimizer", self.optimizer), ShaPOOptimizer):
                self._shapo_optimizer().restore()

    def _ascend(self, optimizer: ShaPOOptimizer, model: nn.Module, items: Any) -> None:
        partial = self.shapo.ascent_fraction < 1
        model.train()
        random = RandomState(self.args.device)
        losses = []
        # A partial ascent's numbers are of other rows than the descent's, so the trainer does not count them.
        with optimizer.ascent(), self._metrics_as_they_are() if partial else contextlib.nullcontext():
            for inputs in self._micro_batches:
                inputs = self._prepare_inputs(self._part(inputs) if partial else dict(inputs))
                with self.compute_loss_context_manager():
                    loss: Any = self.compute_loss(model, inputs, num_items_in_batch=items)
                loss = loss.mean()
                if not self._is_scaled(items):
                    loss = loss / len(self._micro_batches)
                losses.append(loss.detach())
                scaler = getattr(self.accelerator, "scaler", None)
                optimizer.ascend(loss if scaler is None else scaler.scale(loss))
        random.restore()
        optimizer.perturb()
        total = torch.stack(losses).sum()
        self._ascent_losses.append(total)
        self._gaps.append(-total)

    def _is_scaled(self, items: Any) -> bool:
        """Whether the loss comes divided for the whole update already, by the model or by ``compute_loss_func``."""
        known = getattr(self, "loss_is_scaled_for_ga", None)
        if known is not None:
            return bool(known)
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def _part(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Some rows of a micro-batch; of preference pairs, B chosen rows above B rejected ones, both of a pair."""
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
        lengths = {value.shape[0] for value in tensors.values()}
        rows = max(lengths)
        pairs = rows // 2 if self._is_preference_trainer() else rows
        if not lengths <= {rows, pairs}:
            raise ValueError(f"a batch of tensors with {sorted(lengths)} rows cannot be cut: use ascent_fraction=1")
        count = math.ceil(self.shapo.ascent_fraction * pairs)
        chosen = torch.randperm(pairs, generator=self._drawn_rows)[:count].sort().values
        both = torch.cat([chosen, chosen + pairs]) if pairs < rows else chosen
        return {
            name: value[(both if value.shape[0] == rows else chosen).to(value.device)] if name in tensors else value
            for name, value in inputs.items()
        }

    def _is_preference_trainer(self) -> bool:
        return hasattr(self, "precompute_ref_logps")

    # -- what is logged

    @contextlib.contextmanager
    def _metrics_as_they_are(self) -> Iterator[None]:
        """Forget what ``compute_loss`` counts inside: trl keeps means of metrics and a number of tokens."""
        names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(self, name)]
        kept = {name: copy.deepcopy(getattr(self, name)) for name in names}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._ascent_losses and "loss" in logs:
            stats = self._shapo_optimizer().stats
            logs |= {
                "shapo/ascent_loss": torch.stack(self._ascent_losses).mean().item(),
                "shapo/gap": torch.stack(self._gaps).mean().item(),
                **{
                    f"shapo/{name}": stats[name]
                    for name in ("grad_norm", "epsilon_norm", "relative_radius", "realised_cosine", "skipped")
                },
            }
            self._ascent_losses, self._gaps = [], []
        super().log(logs, *args, **kwargs)
