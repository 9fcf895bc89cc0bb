"""Preference optimisation, plain or ShaPO: the loop over the two passes, in plain PyTorch, one model, one process.

One update, with K micro-batches:

    ascent    (when due)  loss of each micro-batch at theta          -> the direction eps, inside the subspace
    descent               loss of each micro-batch at theta + eps    -> .grad, clipped once -> base optimizer ->
    scheduler

The reference and the reward model are not run here: their numbers are looked up by the pair's index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from shapo.errors import UserError
from shapo.evaluation import flips_fitted, preference_metrics
from shapo.random_state import RandomState
from shapo.rewards import PairRewards
from shapo.training.config import LoopConfig, LossConfig, ShaPOConfig, identity
from shapo.training.fingerprint import digest_model, digest_rows, digest_tensors
from shapo.training.logps import PairLogps, TokenizedPairs, batch_logps, cached_logps, compute_logps
from shapo.training.loop import METRICS, Loop, read_state
from shapo.training.metrics import read_metrics
from shapo.training.objective import make_batch, make_loss
from shapo.training.optimizers import clip_gradients, make_optimizer, make_scheduler
from shapo.training.order import split
from shapo_kernels import ShaPOOptimizer, Subspace, losses


def train_preferences(
    model: torch.nn.Module,
    data: TokenizedPairs,
    *,
    loss: LossConfig,
    loop: LoopConfig,
    output: Path,
    shapo: ShaPOConfig | None = None,
    subspace: Subspace | None = None,
    rewards: PairRewards | None = None,
    evaluation: TokenizedPairs | None = None,
    resume: bool = False,
    progress: bool = True,
    name: str = "train",
) -> dict[str, Any]:
    """Trains `model` in place; as it is given, it is the reference.

    Args:
        model: The policy.
        data: Training pairs; flipped ones are watched: how many of their wrong labels the model comes to agree with.
        loss: The loss and its aggregation.
        loop: Length, batches, optimizer.
        output: Folder of metrics, caches and checkpoints; the caller saves the model.
        shapo: The perturbation, or None for plain training.
        subspace: Where weights are perturbed; with `shapo` alone.
        rewards: The training pairs' rewards, for the reward level.
        evaluation: Clean pairs.

    Returns:
        A summary: `updates`, `seconds_per_update` and `cpu_seconds_per_update` (medians), `final` (last evaluation),
        `rho_over_weight_norm` (median over the ShaPO updates, or None), `flipped` (number of flipped labels).

    Raises:
        UserError: Options that do not belong together, a loss that is no longer finite, or see `Loop.train`.
        SubspaceError: The subspace does not fit the model.
    """
    if (shapo is None) != (subspace is None):
        raise UserError("ShaPO needs both a radius and a subspace, plain training neither")
    if loss.uses_rewards != (rewards is not None):
        raise UserError("the reward level needs rewards, and no other loss takes any")
    start = digest_model(model)
    run = {
        "kind": "preference",
        "model": start,
        "data": data.digest(),
        "rewards": rewards.digest() if rewards else None,
        "subspace": _digest_subspace(subspace) if subspace else None,
        **identity(loop),
        **{f"loss.{key}": value for key, value in identity(loss).items()},
        **({f"shapo.{key}": value for key, value in identity(shapo).items()} if shapo else {}),
    }
    state = read_state(output, run, resume=resume)
    size = loop.micro_batch_size or loop.batch_size
    cached: dict[str, Any] = {"model_digest": start, "bf16": loop.bf16, "batch_size": size, "progress": progress}
    reference = held_out = None
    if loss.uses_reference:
        reference = cached_logps(output / "reference.safetensors", model, data, description="reference", **cached)
        if evaluation is not None:
            held_out = cached_logps(output / "reference-evaluation.safetensors", model, evaluation, **cached)
    base = make_optimizer(model.parameters(), loop)
    optimizer: Any = base
    if shapo is not None and subspace is not None:
        optimizer = ShaPOOptimizer(
            base,
            model,
            subspace,
            rho=shapo.rho,
            relative=shapo.relative,
            interval=shapo.interval,
            ascent=shapo.ascent,
            perturbation=shapo.perturbation,
            norm=shapo.norm,
            seed=loop.seed,
        )
    scheduler = make_scheduler(optimizer, loop, loop.total_updates(len(data)))
    update = _Update(model, optimizer, data, loss, loop, shapo, reference, rewards)
    watch = _Evaluation(model, data, evaluation, reference, held_out, loss, loop)
    try:
        Loop(model, optimizer, scheduler, loop, len(data), run, output).train(
            update, watch if watch.has_work else None, state=state, progress=progress, name=name
        )
    finally:
        if isinstance(optimizer, ShaPOOptimizer):
            optimizer.detach()
    return _summary(output / METRICS, int(data.flipped.sum()))


@dataclass
class _Update:
    """One update of the weights from the pairs of some indices, and what to log of it."""

    model: torch.nn.Module
    optimizer: Any
    data: TokenizedPairs
    loss: LossConfig
    loop: LoopConfig
    shapo: ShaPOConfig | None
    reference: PairLogps | None
    rewards: PairRewards | None

    def __post_init__(self) -> None:
        self._device = next(self.model.parameters()).device
        self._objective = make_loss(self.loss)

    def __call__(self, indices: list[int]) -> dict[str, Any]:
        ascent: dict[str, float] | None = None
        perturbed: Any = nullcontext()
        random = RandomState(self._device)
        if self.shapo is not None:
            self.optimizer.rho = self.shapo.rho if self.optimizer.updates >= self.shapo.plain_updates else 0.0
            if self.optimizer.due:
                part = indices[: math.ceil(self.shapo.ascent_fraction * len(indices))]
                with self.optimizer.ascent():
                    ascent = self._pass(part, self.optimizer.ascend)
                random.restore()
            perturbed = self.optimizer.perturbed()
        with perturbed:
            descent = self._pass(indices, Tensor.backward)
        if not math.isfinite(descent["loss"]):
            raise UserError(f"the loss is {descent['loss']}: training has diverged; lower the learning rate or rho")
        norm = clip_gradients(self.model.parameters(), self.loop.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Accuracy and margin are those of the weights themselves, before they were moved.
        values: dict[str, Any] = {**(ascent or descent), "loss": descent["loss"], "grad_norm": norm.item()}
        if ascent is not None:
            gap = descent["loss"] - ascent["loss"]
            values |= {"ascent_loss": ascent["loss"], "gap": gap, "shapo": dict(self.optimizer.stats)}
        return values

    def _pass(self, indices: Sequence[int], backward: Callable[[Tensor], Any]) -> dict[str, float]:
        micro_batches = split(list(indices), self.loop.micro_batch_size)
        whole = self._whole_batch(micro_batches)
        outputs = []
        for micro in micro_batches:
            output = self._forward(micro, whole)
            # The mean's shares by the number of pairs, which may differ in the last micro-batch.
            backward(output.per_pair.sum() / len(indices) if self.loss.aggregation == "mean" else output.loss)
            outputs.append((output.per_pair.detach(), output.margin))
        per_pair, margin = (torch.cat(column) for column in zip(*outputs, strict=True))
        return {
            "loss": self._objective.aggregate(per_pair).item(),
            "accuracy": (margin > 0).float().mean().item(),
            "margin": margin.mean().item(),
        }

    def _whole_batch(self, micro_batches: Sequence[Sequence[int]]) -> losses.WholeBatch | None:
        """What Dr.DPO's micro-batches must know of one another; one more forward pass over the batch finds it."""
        if len(micro_batches) == 1 or not self._objective.needs_whole_batch:
            return None
        random = RandomState(self._device)
        with torch.no_grad():
            per_pair = [self._forward(micro, None).per_pair for micro in micro_batches]
        random.restore()
        return self._objective.whole_batch(per_pair)

    def _forward(self, micro: Sequence[int], whole: losses.WholeBatch | None) -> losses.PreferenceOutput:
        policy = batch_logps(self.model, self.data.batch(micro, self._device), bf16=self.loop.bf16)
        reference = None if self.reference is None else self.reference[micro]
        rewards = None if self.rewards is None else self.rewards[micro]
        return self._objective(make_batch(policy, reference, rewards), whole=whole)


@dataclass
class _Evaluation:
    """Clean pairs held out, and the flipped labels of the training pairs."""

    model: torch.nn.Module
    data: TokenizedPairs
    held_out: TokenizedPairs | None
    reference: PairLogps | None
    held_out_reference: PairLogps | None
    loss: LossConfig
    loop: LoopConfig

    def __post_init__(self) -> None:
        self._flipped = self.data.flipped.nonzero()[:, 0].tolist()
        self._noisy = self.data.subset(self._flipped) if self._flipped else None

    @property
    def has_work(self) -> bool:
        return self.held_out is not None or self._noisy is not None

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self.held_out is not None:
            policy = self._logps(self.held_out)
            values |= preference_metrics(policy, self.held_out_reference, self.held_out.pairs, beta=self.loss.beta)
        if self._noisy is not None:
            reference = None if self.reference is None else self.reference[self._flipped]
            share = flips_fitted(self._logps(self._noisy), reference, self._noisy.flipped)
            values["flips_fitted"] = share.as_dict()
        return values

    def _logps(self, data: TokenizedPairs) -> PairLogps:
        size = self.loop.micro_batch_size or self.loop.batch_size
        return compute_logps(self.model, data, batch_size=2 * size, bf16=self.loop.bf16, progress=False)


def _digest_subspace(subspace: Subspace) -> str:
    return digest_rows([digest_tensors(subspace), *([name, subspace.axis(name)] for name in sorted(subspace.names))])


def _summary(path: Path, flipped: int) -> dict[str, Any]:
    updates, evaluations = read_metrics(path, "update"), read_metrics(path, "evaluation")
    radii = [row["shapo"]["relative_radius"] for row in updates if "shapo" in row]
    final = {
        key: value["value"] if isinstance(value, dict) else value
        for key, value in (evaluations[-1] if evaluations else {}).items()
        if key in ("accuracy", "loss", "margin", "flips_fitted")
    }
    return {
        "updates": len(updates),
        "seconds_per_update": median(row["seconds"] for row in updates),
        "cpu_seconds_per_update": median(row["cpu_seconds"] for row in updates),
        "rho_over_weight_norm": median(radii) if radii else None,
        "flipped": flipped,
        "final": final,
    }
