"""A mixin that makes a `transformers.Trainer`, or a trainer built on it as `trl`'s are, take ShaPO updates.

    class ShaPODPOTrainer(ShaPOTrainerMixin, DPOTrainer): ...
    trainer = ShaPODPOTrainer(model, args=..., train_dataset=..., shapo=ShaPOArguments(subspace, rho=0.05))

A trainer fetches all micro-batches of an update before it trains on the first. The ascent goes over them there; the
weights then stay perturbed through the trainer's own forward and backward passes and are restored before it clips the
gradients and steps. Losses are the trainer's own `compute_loss`: nothing of them is written again here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from shapo.ascents import Seen, ascend
from shapo.libraries.accelerate import beneath, scaler_of
from shapo.libraries.transformers import count_items, is_scaled, prepare_inputs
from shapo.libraries.trl import metrics_kept
from shapo_kernels import ShaPOOptimizer

from .arguments import ShaPOArguments
from .batches import Cutter
from .fused_head import FusedHeadMixin
from .refusals import refuse_before, refuse_trainer

_STATE = "shapo.pt"
_LOGGED = ("grad_norm", "epsilon_norm", "relative_radius", "realised_cosine", "skipped")


class ShaPOTrainerMixin(FusedHeadMixin):
    """Put before a trainer in a class's bases; takes one more keyword, `shapo`, and `fused_head` of its base.

    Logged beside the trainer's numbers: `shapo/ascent_loss` (the loss at the weights themselves), `shapo/gap` (what
    the perturbation adds; `loss` itself is taken at the perturbed weights) and the last perturbation's
    `shapo/grad_norm`, `epsilon_norm`, `relative_radius`, `realised_cosine`, `skipped`. The trainer's own
    metrics are counted once: at the weights themselves where the ascent sees the whole batch. Where it sees a part,
    the ascent's loss is of that part, and the gap is between other rows.

    A DPO trainer's reference model is asked once for each micro-batch, before the weights are moved.

    Args:
        shapo: the options; may be left out where `optimizers` has a ready :class:`shapo_kernels.ShaPOOptimizer`.

    Raises:
        TypeError: `shapo` is no :class:`ShaPOArguments`, or lacks what it takes to wrap an optimizer.
        ValueError: options of a ready optimizer given twice; more `ascent_pairs` than an ascent is over;
            `nn.DataParallel`, trainers that generate their batches, reentrant checkpointing with the selective
            ascent, a ready optimizer under DeepSpeed.
    """

    def __init__(self, *args: Any, shapo: ShaPOArguments | None = None, **kwargs: Any) -> None:
        # Looked at first where it can be: making a trainer may take as long as precomputing a data set.
        self.shapo = refuse_before(shapo, args, kwargs)
        self._micro_batches: list[Any] = []
        self._position = 0
        self._ascended = False
        self._wrapped: ShaPOOptimizer | None = None
        self._ascent_losses: list[Tensor] = []
        self._gaps: list[Tensor] = []
        super().__init__(*args, **kwargs)
        refuse_trainer(self, self.shapo)
        self._part = self.shapo.part(self.shapo.seed)
        self._cutter = None if self._part.is_whole else Cutter(self)
        self.add_callback(_RestoreBeforeAnEpochEnds(self))

    # -- the optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, or the one it was given, wrapped; a ready ShaPOOptimizer as it is.

        Under DeepSpeed it is wrapped once there is an engine.
        """
        created = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled:
            return created
        found = beneath(created)
        if found is self._wrapped:
            return created  # a second train()
        if isinstance(found, ShaPOOptimizer):
            self.shapo.refuse_an_optimizers_options()
        else:
            model: Any = next((m for m in (*args, kwargs.get("model")) if m is not None), self.model)
            created = self.optimizer = found = self.shapo.wrap(created, model)
        self._take(found)
        return created

    def _take(self, optimizer: ShaPOOptimizer) -> None:
        self._wrapped, self._schedule = optimizer, self.shapo.schedule(optimizer.rho)
        if not self._schedule.is_constant and _have_radii_of_their_own(optimizer):
            raise ValueError("plain_updates and rho_warmup set opt.rho, but a param group has a radius of its own")

    def _shapo_optimizer(self) -> ShaPOOptimizer:
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            if self._wrapped is None or self._wrapped.model is not engine:
                if self._wrapped is not None:  # of an earlier train()
                    self._wrapped.detach()
                self._take(self.shapo.wrap(engine.optimizer, engine))
            return self._wrapped  # type: ignore[return-value]
        found = beneath(self.optimizer)
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
            self._begin_update(optimizer, model)
        with self._reference_answers() if self._ascended else contextlib.nullcontext():
            if self._ascended and self.shapo.per_micro_batch:
                self._ascend(optimizer, model, num_items_in_batch, [self._micro_batches[self._position]])
            elif self._ascended and self._position == 0:
                self._ascend(optimizer, model, num_items_in_batch, self._micro_batches)
            counted = self._ascended and self._part.is_whole
            with metrics_kept(self) if counted else contextlib.nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
        if self._ascended:
            self._gaps[-1] = self._gaps[-1] + loss.detach()
        self._position += 1
        if self.shapo.per_micro_batch or self._position == len(self._micro_batches):
            optimizer.restore()
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._wrapped is not None:
                self._wrapped.restore()

    def _begin_update(self, optimizer: ShaPOOptimizer, model: nn.Module) -> None:
        # Still perturbed where the last update was given up: an exception that the trainer caught, a smaller batch.
        optimizer.restore()
        optimizer.model = model  # wrapped by now, where it is going to be
        if not self._schedule.is_constant and optimizer.updates <= self._schedule.ends_at():
            optimizer.rho = self._schedule.at(optimizer.updates)
        self._ascended = optimizer.due
        if self._ascended:
            self._ascent_losses.append(torch.zeros((), device=self.args.device))
            self._gaps.append(torch.zeros((), device=self.args.device))

    def _ascend(self, optimizer: ShaPOOptimizer, model: nn.Module, items: Any, micro_batches: Sequence[Any]) -> None:
        """Pass 1 over micro-batches: the whole update's, or one."""
        seen = self._seen(micro_batches, optimizer.updates)
        own = items
        if items is not None and (self._cutter is not None or len(micro_batches) < len(self._micro_batches)):
            own = count_items(self, [one.inputs for one in seen if one.share])
        scaled = is_scaled(self, own)
        total = torch.zeros((), device=self.args.device)

        def loss_of(one: _Part) -> Tensor:
            nonlocal total
            loss = self._loss(model, one.inputs, own).mean()
            loss = loss if scaled else loss * one.share
            total = total + loss.detach()
            return loss

        parts = [
            Seen(
                partial(loss_of, one) if one.share else None,
                None if one.rows is None else partial(self._loss, model, one.whole, own),
                one.rows,
            )
            for one in seen
        ]
        model.train()
        # A partial ascent's numbers are of other rows than the descent's, so the trainer does not count them.
        with (
            contextlib.nullcontext() if self._part.is_whole else metrics_kept(self),
            getattr(self, "maybe_activation_offload_context", contextlib.nullcontext()),
        ):
            ascend(optimizer, parts, self.args.device, scaler=scaler_of(self))
        optimizer.perturb()
        if self.shapo.per_micro_batch:
            # Its own mean, for its own direction; of the update's loss it is the share that the descent's is.
            total = total * (own / items if scaled else 1 / len(self._micro_batches))
        self._ascent_losses[-1] = self._ascent_losses[-1] + total
        self._gaps[-1] = self._gaps[-1] - total

    def _loss(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> Tensor:
        prepared = prepare_inputs(self, inputs)
        with self.compute_loss_context_manager():
            return cast(Tensor, self.compute_loss(model, prepared, num_items_in_batch=items))

    def _seen(self, micro_batches: Sequence[Any], update: int) -> list[_Part]:
        """What the ascent sees of each micro-batch."""
        if self._cutter is None:
            return [_Part(inputs, inputs, 1 / len(micro_batches)) for inputs in micro_batches]
        number = self._position if self.shapo.per_micro_batch else 0
        drawn = self._part.draw([self._cutter.count(inputs) for inputs in micro_batches], update, number)
        together = sum(map(len, drawn))
        return [
            _Part(
                inputs,
                self._cutter.take(inputs, pairs) if pairs else inputs,
                len(pairs) / together,
                self._cutter.rows(inputs, pairs),
            )
            for inputs, pairs in zip(micro_batches, drawn, strict=True)
        ]

    # -- the reference

    @contextlib.contextmanager
    def _reference_answers(self) -> Iterator[None]:
        """Inside, a DPO trainer finds its reference's log-probabilities in the micro-batches, as if precomputed."""
        if getattr(self, "precompute_ref_logps", True):
            yield
            return
        if self._position == 0:
            trainer: Any = self  # of the class that the mixin stands before
            for inputs in self._micro_batches:
                reference = trainer.ref_model or self.model
                logps = trainer.compute_ref_log_probs(reference, prepare_inputs(self, inputs))
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = logps
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.precompute_ref_logps = False

    # -- checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        # Under FSDP the optimizer's state is saved by the names of parameters, and everything else of it dropped; under
        # DeepSpeed the engine saves its own.
        if self._saves_beside and self.args.should_save:
            torch.save(self._shapo_optimizer().shapo_state_dict(), Path(output_dir) / _STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._saves_beside and (path := Path(checkpoint) / _STATE).exists():
            self._shapo_optimizer().load_shapo_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @property
    def _saves_beside(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # -- what is logged

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._ascent_losses and "loss" in logs:
            stats = self._shapo_optimizer().stats
            # Over the ranks, as the trainer's own loss is.
            means = torch.stack([torch.stack(self._ascent_losses).mean(), torch.stack(self._gaps).mean()])
            ascent_loss, gap = self.accelerator.gather(means.unsqueeze(0)).mean(0).tolist()
            logs |= {
                "shapo/ascent_loss": ascent_loss,
                "shapo/gap": gap,
                **{f"shapo/{name}": stats[name] for name in _LOGGED},
            }
            self._ascent_losses, self._gaps = [], []
        super().log(logs, *args, **kwargs)


@dataclass(frozen=True)
class _Part:
    """A micro-batch, what an ascent sees of it, the share of that in everything it sees, and which rows it is."""

    whole: dict[str, Any]
    inputs: dict[str, Any]
    share: float
    rows: Tensor | None = None


class _RestoreBeforeAnEpochEnds(TrainerCallback):
    """An epoch may be stopped between the micro-batches of an update; evaluation and saving follow at once."""

    def __init__(self, trainer: ShaPOTrainerMixin) -> None:
        self._trainer = trainer

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._shapo_optimizer().restore()


def _have_radii_of_their_own(optimizer: ShaPOOptimizer) -> bool:
    key = "shapo_rho" if "rho" in optimizer.defaults else "rho"
    return any(key in group for group in optimizer.param_groups)
