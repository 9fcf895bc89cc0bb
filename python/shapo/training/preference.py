"""Preference optimisation, plain or ShaPO: the loop over the two passes, in plain PyTorch, one model, one process.

One update, with K micro-batches:

    ascent    (when due)  loss of each micro-batch at theta          -> the direction eps, inside the subspace
    descent               loss of each micro-batch at theta + eps    -> .grad, clipped once -> base optimizer ->
    scheduler

The ascent may look at a part of the pairs; with `per_micro_batch` the two passes alternate, a direction for each
micro-batch.

The reference and the reward model are not run here: their numbers are looked up by the pair's index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from shapo.config import LoopConfig, LossConfig, ShaPOConfig, identity
from shapo.errors import UserError
from shapo.evaluation import flips_fitted, preference_metrics
from shapo.libraries.peft import is_peft
from shapo.models.adapters import adapter_identity, digest_base
from shapo.models.fused_head import FusedHead, find_fused_head
from shapo.models.modes import evaluating
from shapo.notes import note
from shapo.scoring.logps import PairLogps, TokenizedPairs, batch_logps, cached_logps, compute_logps
from shapo.scoring.objective import make_batch, make_loss
from shapo.scoring.rewards import PairRewards
from shapo.storage.fingerprint import digest_model, digest_rows, digest_tensors
from shapo.training.loop import METRICS, Loop, Save, read_state
from shapo.training.metrics import read_metrics
from shapo.training.optimizers import clip_gradients, make_optimizer, make_scheduler, require_finite
from shapo.training.order import split
from shapo.training.rounding import StepRounding
from shapo_kernels import ShaPOOptimizer, Subspace, losses
from shapo_kernels.update.random_state import RandomState


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
    save: Save | None = None,
    resume: bool = False,
    progress: bool = True,
    name: str = "train",
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains `model` in place; as it is given, it is the reference.

    Args:
        model: The policy.
        data: Training pairs; flipped ones are watched: how many of their wrong labels the model comes to agree with.
        loss: The loss and its aggregation.
        loop: Length, batches, optimizer.
        output: Folder of metrics, caches and checkpoints.
        shapo: The perturbation, or None for plain training.
        subspace: Where weights are perturbed; with `shapo` alone.
        rewards: The training pairs' rewards, for the reward level.
        evaluation: Clean pairs.
        save: Saves the model; called as soon as the weights are final.
        about: What a report is to know of the run before it is finished, beside its `digests`.

    Returns:
        A summary: `updates`, `seconds_per_update` and `cpu_seconds_per_update` (medians), `final` (last evaluation),
        `rho_over_weight_norm` (median over the ShaPO updates, or None), `flipped` (number of flipped labels),
        `digests` (of the model at the start, of its `base` without an adapter, the training pairs, the evaluation
        pairs).

    Raises:
        UserError: Options that do not belong together, a loss that is no longer finite, or see `Loop.train`.
        SubspaceError: The subspace does not fit the model.
    """
    if (shapo is None) != (subspace is None):
        raise UserError("ShaPO needs both a radius and a subspace, plain training neither")
    if subspace is not None and not subspace.count:
        raise UserError("the subspace selects no neuron, so every update would be a plain one; select some")
    if loss.uses_rewards != (rewards is not None):
        raise UserError("the reward level needs rewards, and no other loss takes any")
    total = loop.total_updates(len(data))
    if shapo is not None:
        _require_an_ascent_that_fits(shapo, loss, loop)
        _require_shapo_updates(shapo, total)
    start = digest_model(model)
    base_start = digest_base(model) if is_peft(model) else start
    run = {
        "kind": "preference",
        "model": start,
        "data": data.digest(),
        "rewards": rewards.digest() if rewards else None,
        "subspace": _digest_subspace(subspace) if subspace else None,
        **adapter_identity(model),
        **identity(loop),
        **{f"loss.{key}": value for key, value in identity(loss).items()},
        **({f"shapo.{key}": value for key, value in identity(shapo).items()} if shapo else {}),
    }
    state = read_state(output, run, resume=resume)
    size = loop.micro_batch_size or loop.batch_size
    head = find_fused_head(model, loop.fused_head)
    precision = {"bf16": loop.bf16, "fused_head": loop.fused_head}
    cached: dict[str, Any] = {"model_digest": start, **precision, "batch_size": size, "progress": progress}
    reference = held_out = None
    if loss.uses_reference:
        reference = cached_logps(output / "reference.safetensors", model, data, description="reference", **cached)
        if evaluation is not None:
            held_out = cached_logps(output / "reference-evaluation.safetensors", model, evaluation, **cached)
    base = make_optimizer(model.parameters(), loop)
    optimizer: Any = base
    if shapo is not None and subspace is not None:
        optimizer = ShaPOOptimizer(base, model, subspace, seed=loop.seed, **shapo.for_optimizer())
        if shapo.reuse_prefix and not optimizer.stats["prefix_blocks"]:
            note(
                "--reuse-prefix saves nothing: the subspace reaches the lowest block; "
                "shapo select --depth 0.25 leaves blocks below it"
            )
        if loop.fused_head == "on":
            find_fused_head(model, "on")  # a perturbed head cannot be left out
    scheduler = make_scheduler(optimizer, loop, total)
    rounding = StepRounding(model.parameters(), scheduler, warmup=loop.warmup, total=total)
    update = _Update(model, optimizer, data, loss, loop, shapo, reference, rewards, head, rounding)
    watch = _Evaluation(model, data, evaluation, reference, held_out, loss, loop)
    held_out_digest = evaluation.digest() if evaluation else None
    digests = {"model": start, "base": base_start, "data": data.digest(), "evaluation": held_out_digest}
    try:
        Loop(model, optimizer, scheduler, loop, len(data), run, output, {**(about or {}), "digests": digests}).train(
            update,
            watch if watch.has_work else None,
            state=state,
            save=save,
            check=update.check,
            progress=progress,
            name=name,
        )
    finally:
        if isinstance(optimizer, ShaPOOptimizer):
            optimizer.detach()
    return {**_summary(output / METRICS, int(data.flipped.sum())), "digests": digests}


@dataclass
class _Pass:
    """What one pass over some micro-batches has seen: the loss and the margin of every pair."""

    indices: list[int] = field(default_factory=list)
    per_pair: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    margins: list[Tensor] = field(default_factory=list)

    def add(self, indices: Sequence[int], policy: PairLogps, output: losses.PreferenceOutput) -> None:
        self.indices.extend(indices)
        self.per_pair.append(output.per_pair.detach())
        self.chosen.append(policy.chosen.detach())
        self.margins.append(output.margin)

    def of(self, values: list[Tensor], indices: Sequence[int]) -> Tensor:
        """What was seen of the pairs of `indices`: `per_pair`, their losses, or `chosen`, their log-probabilities."""
        position = {index: number for number, index in enumerate(self.indices)}
        return torch.cat(values)[[position[index] for index in indices]]

    def accuracy_and_margin(self) -> dict[str, float]:
        margins = torch.cat(self.margins)
        # A tie counts half, as in the evaluation: in the first update every pair is one.
        accuracy = (margins.sign().double().mean().item() + 1) / 2
        return {"accuracy": accuracy, "margin": margins.mean().item()}


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
    head: FusedHead | None
    rounding: StepRounding

    def __post_init__(self) -> None:
        self._device = next(self.model.parameters()).device
        self._objective = make_loss(self.loss)
        self._was_finite = False
        if self.shapo is not None:
            self._part, self._schedule = self.shapo.part(self.loop.seed), self.shapo.schedule(self.shapo.rho or 0.0)

    def __call__(self, indices: list[int]) -> dict[str, Any]:
        micro_batches = split(indices, self.loop.micro_batch_size)
        ascent, descent = _Pass(), _Pass()
        if self.shapo is not None:
            self.optimizer.rho = self._schedule.at(self.optimizer.updates)
        if self.shapo is not None and self.optimizer.due:
            each = self.shapo.per_micro_batch
            for number, own in enumerate([[micro] for micro in micro_batches] if each else [micro_batches]):
                self._ascend(own, number, ascent)
                with self.optimizer.perturbed():
                    self._run(own, Tensor.backward, descent, indices)
        else:
            self._run(micro_batches, Tensor.backward, descent, indices)
        loss = self._aggregate(descent, indices)
        if not math.isfinite(loss):
            # Tokens and rewards are numbers by now, so what is left is the model before and the updates after.
            if not self._was_finite:
                raise UserError(
                    f"the first loss is {loss}, before any update: look at the model's weights, they give it"
                )
            raise UserError(f"the loss is {loss}: training has diverged; lower the learning rate or rho")
        self._was_finite = True
        norm = clip_gradients(self.model.parameters(), self.loop.clip)
        require_finite(norm)
        moved = self.rounding.step(self.optimizer)
        self.optimizer.zero_grad()
        # Accuracy and margin are those of the weights themselves, before they were moved.
        seen = ascent if ascent.indices else descent
        values: dict[str, Any] = {"loss": loss, **seen.accuracy_and_margin(), "grad_norm": norm.item(), **moved}
        if self.loss.nll:
            values["nll"] = self._nll(seen, seen.indices)
        values |= {"tokens": self.data.tokens(indices)}
        if ascent.indices:
            before = self._aggregate(ascent, ascent.indices)
            gap = self._aggregate(descent, ascent.indices) - before
            values |= {"ascent_loss": before, "gap": gap, "shapo": dict(self.optimizer.stats)}
        return values

    def check(self) -> float:
        """The loss of one micro-batch at the weights as they are."""
        size = min(self.loop.micro_batch_size or self.loop.batch_size, len(self.data))
        with evaluating(self.model), torch.no_grad():
            return self._forward(range(size), None)[1].per_pair.mean().item()

    def _ascend(self, micro_batches: Sequence[list[int]], number: int, seen: _Pass) -> None:
        drawn = self._part.draw([len(micro) for micro in micro_batches], self.optimizer.updates, number)
        part = [[micro[i] for i in rows] for micro, rows in zip(micro_batches, drawn, strict=True) if rows]
        indices = [index for micro in part for index in micro]
        random = RandomState(self._device)
        with self.optimizer.ascent():
            if self.shapo is not None and self.shapo.reuse_prefix and not self._part.is_whole:
                self._ascend_on_rows(micro_batches, drawn, seen, indices)
            else:
                self._run(part, self.optimizer.ascend, seen, indices)
        random.restore()

    def _ascend_on_rows(
        self, micro_batches: Sequence[list[int]], drawn: Sequence[list[int]], seen: _Pass, indices: Sequence[int]
    ) -> None:
        """An ascent on the drawn pairs, padded as their micro-batches are: the descent reuses the blocks below."""
        whole = self._whole_batch(micro_batches, indices, drawn)
        for micro, rows in zip(micro_batches, drawn, strict=True):
            both = torch.tensor([*rows, *(len(micro) + i for i in rows)], dtype=torch.int64)
            with self.optimizer.ascent_part(partial(self._logps, micro), both):
                if rows:
                    policy, output = self._forward(micro, whole, rows)
                    self.optimizer.ascend(output.loss)
                    seen.add([micro[i] for i in rows], policy, output)

    def _run(
        self,
        micro_batches: Sequence[list[int]],
        backward: Callable[[Tensor], Any],
        seen: _Pass,
        indices: Sequence[int],
    ) -> None:
        """Forward and backward over micro-batches, whose losses are shares of that of the pairs `indices`."""
        whole = self._whole_batch(micro_batches, indices)
        for micro in micro_batches:
            policy, output = self._forward(micro, whole)
            backward(output.loss)
            seen.add(micro, policy, output)

    def _aggregate(self, seen: _Pass, indices: Sequence[int]) -> float:
        loss = self._objective.aggregate(seen.of(seen.per_pair, indices)).item()
        return loss + self.loss.nll * self._nll(seen, indices) if self.loss.nll else loss

    def _nll(self, seen: _Pass, indices: Sequence[int]) -> float:
        return -seen.of(seen.chosen, indices).double().sum().item() / max(1, self.data.chosen_tokens(indices))

    def _whole_batch(
        self,
        micro_batches: Sequence[Sequence[int]],
        indices: Sequence[int],
        drawn: Sequence[Sequence[int]] | None = None,
    ) -> losses.WholeBatch | None:
        """What micro-batches must know of all the pairs, `indices`; Dr.DPO's need one more forward pass for it."""
        tokens = torch.tensor(self.data.chosen_tokens(indices), dtype=torch.float64, device=self._device)
        if not self._objective.needs_whole_batch:
            # Shares by the numbers of pairs and of tokens, which may differ in the last micro-batch.
            pairs = torch.tensor(len(indices), dtype=torch.float64, device=self._device)
            return losses.WholeBatch(torch.zeros_like(pairs), pairs, 1, None, tokens)
        if len(micro_batches) == 1:
            return None
        random = RandomState(self._device)
        with torch.no_grad():
            seen: list[Sequence[int] | None] = [None] * len(micro_batches) if drawn is None else [*drawn]
            per_pair = [
                self._forward(micro, None, rows)[1].per_pair
                for micro, rows in zip(micro_batches, seen, strict=True)
                if rows != []
            ]
        random.restore()
        return replace(self._objective.whole_batch(per_pair), chosen_tokens=tokens)

    def _forward(
        self, micro: Sequence[int], whole: losses.WholeBatch | None, rows: Sequence[int] | None = None
    ) -> tuple[PairLogps, losses.PreferenceOutput]:
        """Of a micro-batch, or of some of its pairs by their positions in it."""
        policy = self._logps(micro, rows)
        micro = micro if rows is None else [micro[i] for i in rows]
        reference = None if self.reference is None else self.reference[micro]
        rewards = None if self.rewards is None else self.rewards[micro]
        return policy, self._objective(make_batch(policy, reference, rewards), whole=whole)

    def _logps(self, micro: Sequence[int], rows: Sequence[int] | None = None) -> PairLogps:
        batch = self.data.batch(micro, self._device)
        if rows is not None:
            both = torch.tensor([*rows, *(len(micro) + i for i in rows)], device=self._device)
            batch = {name: value[both] for name, value in batch.items()}
        return batch_logps(self.model, batch, bf16=self.loop.bf16, head=self.head)


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

    def __call__(self, done: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self.held_out is not None:
            policy = self._logps(self.held_out, self.held_out_reference, done)
            values |= preference_metrics(policy, self.held_out_reference, self.held_out.pairs, beta=self.loss.beta)
        if self._noisy is not None:
            reference = None if self.reference is None else self.reference[self._flipped]
            share = flips_fitted(self._logps(self._noisy, reference, done), reference, self._noisy.flipped)
            values["flips_fitted"] = share.as_dict()
        return values

    def _logps(self, data: TokenizedPairs, reference: PairLogps | None, done: int) -> PairLogps:
        if done == 0 and reference is not None:
            # The model still is its reference. Asked again, in other batches, it would differ by rounding, and the sign
            # of that would pass for an accuracy: every pair is a tie.
            return reference
        size = self.loop.micro_batch_size or self.loop.batch_size
        options: dict[str, Any] = {"bf16": self.loop.bf16, "fused_head": self.loop.fused_head, "progress": False}
        return compute_logps(self.model, data, batch_size=2 * size, **options)


def _require_an_ascent_that_fits(shapo: ShaPOConfig, loss: LossConfig, loop: LoopConfig) -> None:
    size = loop.micro_batch_size or loop.batch_size
    if shapo.per_micro_batch and loss.aggregation != "mean" and size < loop.batch_size:
        raise UserError(
            f"the aggregation {loss.aggregation} is over the whole batch and per_micro_batch takes its micro-batches "
            "apart: choose the mean, or one ascent of the whole batch"
        )
    try:
        shapo.part(loop.seed).require_at_most(min(size, loop.batch_size) if shapo.per_micro_batch else loop.batch_size)
    except ValueError as error:
        raise UserError(error) from error


def _require_shapo_updates(shapo: ShaPOConfig, total: int) -> None:
    """Refuses a run that says ShaPO and makes plain updates alone; tells of a radius that is never reached."""
    acting = [n for n in range(total) if (n + 1) % shapo.interval == 0 and n >= shapo.plain_updates]
    if not acting:
        raise UserError(
            f"of {total} updates none would be a ShaPO update with an interval of {shapo.interval} after "
            f"{shapo.plain_updates} plain ones: lower them, or leave rho out"
        )
    reached = shapo.plain_updates + max(shapo.rho_warmup, 1)
    if acting[-1] + 1 < reached:
        note(f"rho is reached after {reached} updates, and the last ShaPO update is number {acting[-1] + 1}")


def _digest_subspace(subspace: Subspace) -> str:
    axes = ([name, subspace.axis(name)] for name in sorted(subspace.names))
    own = [[name] for name in sorted(subspace.names) if subspace.own_layer(name)]
    return digest_rows([digest_tensors(subspace), *axes, *own])


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
