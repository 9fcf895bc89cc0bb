"""Preference optimisation, plain or ShaPO: a run of `update.PreferenceUpdate`s, on one process or several ranks.

The reference and the reward model are not run in an update: their numbers are looked up by the pair's index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shapo.checked import checked
from shapo.config import LoopConfig, LossConfig, ShaPOConfig, identity
from shapo.errors import UserError
from shapo.evaluation import flips_fitted, preference_metrics
from shapo.libraries.peft import is_peft
from shapo.models.adapters import adapter_identity, digest_base
from shapo.models.fused_head import find_fused_head
from shapo.notes import note
from shapo.ranks import Ranks
from shapo.scoring.logps import PairLogps, TokenizedPairs, cached_logps, compute_logps
from shapo.scoring.rewards import PairRewards
from shapo.storage.fingerprint import digest_model, digest_rows, digest_tensors
from shapo.training.engine import Engine
from shapo.training.loop import METRICS, Loop, Save, read_state
from shapo.training.metrics import read_metrics
from shapo.training.optimizers import make_scheduler
from shapo.training.rounding import StepRounding
from shapo.training.update import PreferenceUpdate
from shapo_kernels import ShaPOOptimizer, Subspace


@checked
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
        model: The policy. On other ranks than 0 its `models.spread.skeleton` does as well: values are rank 0's.
        data: Training pairs; flipped ones are watched: how many of their wrong labels the model comes to agree with.
        loss: The loss and its aggregation.
        loop: Length, batches, optimizer.
        output: Folder of metrics, caches and checkpoints.
        shapo: The perturbation, or None for plain training.
        subspace: Where weights are perturbed; with `shapo` alone.
        rewards: The training pairs' rewards, for the reward level.
        evaluation: Clean pairs.
        save: Saves the whole model that it is given; called by rank 0 as soon as the weights are final.
        about: What a report is to know of the run before it is finished, beside its `digests`.

    Every rank of a launched run calls this with the same arguments; the batch of an update is shared among them.

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
    ranks, total = Ranks.here(), loop.total_updates(len(data))
    if shapo is not None:
        _require_an_ascent_that_fits(shapo, loss, loop, ranks)
        _require_shapo_updates(shapo, total)
    start = ranks.on_main(lambda: digest_model(model))
    base_start = ranks.on_main(lambda: digest_base(model)) if is_peft(model) else start
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
    state = read_state(output, run, ranks, resume=resume)
    each = -(-loop.micro_batch(ranks.count) // ranks.count)
    engine = Engine(model, loop, each)
    model = engine.model
    head = find_fused_head(model, loop.fused_head)
    precision = {"bf16": loop.bf16, "fused_head": loop.fused_head}
    cached: dict[str, Any] = {"model_digest": start, **precision, "batch_size": each, "progress": progress}
    reference = held_out = None
    if loss.uses_reference:
        cached["ranks"] = ranks
        reference = cached_logps(output / "reference.safetensors", model, data, description="reference", **cached)
        if evaluation is not None:
            held_out = cached_logps(output / "reference-evaluation.safetensors", model, evaluation, **cached)
    optimizer: Any = None
    if shapo is None or subspace is None:
        optimizer = engine.plain()
    else:
        optimizer = ShaPOOptimizer(engine.base, model, subspace, seed=loop.seed, **shapo.for_optimizer())
        if shapo.reuse_prefix and not optimizer.stats["prefix_blocks"]:
            note(
                "--reuse-prefix saves nothing: the subspace reaches the lowest block; "
                "shapo select --depth 0.25 leaves blocks below it"
            )
        if loop.fused_head == "on":
            find_fused_head(model, "on")  # a perturbed head cannot be left out
    scheduler = make_scheduler(optimizer, loop, total)
    rounding = StepRounding(model.parameters(), scheduler, warmup=loop.warmup, total=total)
    update = PreferenceUpdate(engine, optimizer, data, loss, loop, shapo, reference, rewards, head, rounding)
    watch = _Evaluation(engine, data, evaluation, reference, held_out, loss, loop, each)
    held_out_digest = evaluation.digest() if evaluation else None
    digests = {"model": start, "base": base_start, "data": data.digest(), "evaluation": held_out_digest}
    try:
        Loop(engine, optimizer, scheduler, loop, len(data), run, output, {**(about or {}), "digests": digests}).train(
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
    summary = ranks.on_main(lambda: _summary(output / METRICS, int(data.flipped.sum())))
    return {**summary, "digests": digests}


@dataclass
class _Evaluation:
    """Clean pairs held out, and the flipped labels of the training pairs."""

    engine: Engine
    data: TokenizedPairs
    held_out: TokenizedPairs | None
    reference: PairLogps | None
    held_out_reference: PairLogps | None
    loss: LossConfig
    loop: LoopConfig
    each: int

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
        options: dict[str, Any] = {"bf16": self.loop.bf16, "fused_head": self.loop.fused_head, "progress": False}
        return compute_logps(self.engine.model, data, batch_size=2 * self.each, ranks=self.engine.ranks, **options)


def _require_an_ascent_that_fits(shapo: ShaPOConfig, loss: LossConfig, loop: LoopConfig, ranks: Ranks) -> None:
    size = loop.micro_batch(ranks.count)
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
    radii = [radius for radius in radii if radius is not None]  # a quantised weight has no norm
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
