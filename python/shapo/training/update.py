"""One update by preference pairs, plain or ShaPO: the two passes over its micro-batches.

    ascent    (when due)  loss of each micro-batch at theta          -> the direction eps, inside the subspace
    descent               loss of each micro-batch at theta + eps    -> .grad, clipped once -> base optimizer ->
    scheduler

The ascent may look at a part of the pairs; with `per_micro_batch` the two passes alternate, a direction for each
micro-batch.

A micro-batch is that of all ranks, and each rank has a share of its pairs. A rank without any runs its passes all the
same, over a stand-in that counts nothing: engines that gather weights want every rank in every pass. Losses are shares
of the whole batch's (`losses.WholeBatch`), so the update is that of one process however unequal the shares are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shapo.ascents import Seen, ascend
from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.errors import UserError
from shapo.models.fused_head import FusedHead
from shapo.models.modes import evaluating
from shapo.notes import note
from shapo.ranks import Ranks
from shapo.scoring.logps import PairLogps, TokenizedPairs, batch_logps, batch_loss, usable_by_pairs
from shapo.scoring.objective import make_batch, make_loss
from shapo.scoring.rewards import PairRewards
from shapo.training.engine import Engine
from shapo.training.order import split
from shapo.training.rounding import StepRounding
from shapo_kernels import losses
from shapo_kernels.update.random_state import RandomState

BLOWN_UP = 10
"""A gap of so many losses of a model that prefers nothing is told; for DPO 10 ln 2, 6.9 nats.

The descent then is at a model that takes the mean pair the wrong way round by odds of some 2000 to 1. The widest radius
of a recorded run (docs/evidence.md) raises the mean loss by 2 nats, single batches' by more.
"""


@dataclass
class Pass:
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

    def share(self, ranks: Ranks, indices: Sequence[int]) -> None:
        """Adds what the other ranks have seen; between them they have seen the pairs of `indices` (a collective)."""
        if ranks.count == 1:
            return
        place = {index: number for number, index in enumerate(indices)}
        own = torch.stack([torch.cat(values) for values in (self.per_pair, self.chosen, self.margins)], dim=1)
        table = ranks.spread(own, [place[index] for index in self.indices], len(indices))
        self.indices = list(indices)
        self.per_pair, self.chosen, self.margins = ([column] for column in table.unbind(1))


@dataclass
class PreferenceUpdate:
    """One update of the weights from the pairs of some indices, and what to log of it."""

    engine: Engine
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
        self._model, self._ranks = self.engine.model, self.engine.ranks
        self._device = next(self._model.parameters()).device
        self._objective = make_loss(self.loss, group=self._ranks.group)
        self._numbers = make_loss(self.loss)
        self._was_finite = self._told_of_gap = False
        self._stand_in = min(range(len(self.data)), key=self.data.length)
        if self.shapo is not None:
            self._part, self._schedule = self.shapo.part(self.loop.seed), self.shapo.schedule(self.shapo.rho or 0.0)

    def __call__(self, indices: list[int]) -> dict[str, Any]:
        micro_batches = split(indices, self.loop.micro_batch(self._ranks.count))
        ascent, descent = Pass(), Pass()
        if self.shapo is not None:
            self.optimizer.rho = self._schedule.at(self.optimizer.updates)
        if self.shapo is not None and self.optimizer.due:
            each = self.shapo.per_micro_batch
            parts = [[micro] for micro in micro_batches] if each else [micro_batches]
            looked_at: list[int] = []
            for number, own in enumerate(parts):
                looked_at += self._ascend(own, number, ascent)
                with self.optimizer.perturbed():
                    self._descend(own, descent, indices, ends=number + 1 == len(parts))
            ascent.share(self._ranks, looked_at)
        else:
            self._descend(micro_batches, descent, indices, ends=True)
        descent.share(self._ranks, indices)
        loss = self._aggregate(descent, indices)
        if not math.isfinite(loss):
            # Tokens and rewards are numbers by now, so what is left is the model before and the updates after.
            if not self._was_finite:
                raise UserError(
                    f"the first loss is {loss}, before any update: look at the model's weights, and at the "
                    "loss's options and rho"
                )
            raise UserError(f"the loss is {loss}: training has diverged; lower the learning rate or rho")
        self._was_finite = True
        step = self.engine.step(self.optimizer, self.rounding)
        # Accuracy and margin are those of the weights themselves, before they were moved.
        seen = ascent if ascent.indices else descent
        values: dict[str, Any] = {"loss": loss, **seen.accuracy_and_margin(), **step}
        if self.loss.nll:
            values["nll"] = self._nll(seen, seen.indices)
        values |= {"tokens": self.data.tokens(indices)}
        if ascent.indices:
            before = self._aggregate(ascent, ascent.indices)
            gap = self._aggregate(descent, ascent.indices) - before
            self._watch(gap, ascent)
            values |= {"ascent_loss": before, "gap": gap, "shapo": dict(self.optimizer.stats)}
        return values

    def check(self) -> float:
        """The loss of as many pairs as a rank has in a micro-batch, the same ones on all ranks."""
        size = min(-(-self.loop.micro_batch(self._ranks.count) // self._ranks.count), len(self.data))
        with evaluating(self._model), torch.no_grad():
            return self._forward(range(size), None)[1].per_pair.mean().item()

    def _ascend(self, micro_batches: Sequence[list[int]], number: int, seen: Pass) -> list[int]:
        """Pass 1. Returns the pairs that it looked at, on all ranks."""
        drawn = self._part.draw([len(micro) for micro in micro_batches], self.optimizer.updates, number)
        part = [[micro[i] for i in rows] for micro, rows in zip(micro_batches, drawn, strict=True) if rows]
        indices = [index for micro in part for index in micro]
        if self.shapo is not None and self.shapo.reuse_prefix and not self._part.is_whole:
            parts = self._on_rows(micro_batches, drawn, seen, indices)
        else:
            own = [self._own(micro) for micro in part]
            whole = self._whole_batch([(mine, None) for mine in own], indices)
            parts = [Seen(partial(self._loss, mine, whole, seen)) for mine in own]
        ascend(self.optimizer, parts, self._device)
        return indices

    def _on_rows(
        self, micro_batches: Sequence[list[int]], drawn: Sequence[list[int]], seen: Pass, indices: Sequence[int]
    ) -> list[Seen]:
        """The drawn pairs, padded as their micro-batches are: the descent reuses the blocks below."""
        mine = [self._ranks.share(len(micro)) for micro in micro_batches]
        own = [self._own(micro) for micro in micro_batches]
        rows_of = [[i - share.start for i in rows if i in share] for share, rows in zip(mine, drawn, strict=True)]
        part = [(micro, rows) for micro, rows, all_rows in zip(own, rows_of, drawn, strict=True) if all_rows]
        whole = self._whole_batch(part, indices)
        parts = []
        for micro, rows, all_rows in zip(own, rows_of, drawn, strict=True):
            fed, taken = self._fed(micro), rows or [0] * bool(all_rows)
            both = torch.tensor([*taken, *(len(fed) + i for i in taken)], dtype=torch.int64)
            loss = partial(self._loss, micro, whole, seen, rows) if all_rows else None
            parts.append(Seen(loss, partial(self._logps, fed), both))
        return parts

    def _descend(self, micro_batches: Sequence[list[int]], seen: Pass, indices: Sequence[int], *, ends: bool) -> None:
        """Pass 2 over micro-batches whose losses are shares of that of the pairs `indices`.

        Args:
            ends: these are the last micro-batches of the update.
        """
        parts = [self._own(micro) for micro in micro_batches]
        whole = self._whole_batch([(own, None) for own in parts], indices)
        for number, own in enumerate(parts):
            with self.engine.accumulating(last=ends and number + 1 == len(parts)):
                tokens = self.data.response_tokens(own)
                if whole is not None and usable_by_pairs(self._model, self.head, tokens, bf16=self.loop.bf16):
                    loss = self._loss_by_pairs(own, whole, seen)
                else:
                    loss = self._loss(own, whole, seen)
                self.engine.backward(loss)

    def _loss(
        self, own: Sequence[int], whole: losses.WholeBatch | None, seen: Pass, rows: Sequence[int] | None = None
    ) -> Tensor:
        policy, output = self._forward(own, whole, rows)
        seen.add(own if rows is None else [own[i] for i in rows], policy, output)
        return output.loss

    def _loss_by_pairs(self, own: Sequence[int], whole: losses.WholeBatch, seen: Pass) -> Tensor:
        """As `_loss`, each pair's loss asked for while the head has the pair's logits: see `batch_loss`."""
        left = list(own)

        def share(policy: PairLogps) -> Tensor:
            pairs, left[:] = left[: len(policy.chosen)], left[len(policy.chosen) :]
            output = self._output(policy, pairs, whole)
            seen.add(pairs, policy, output)
            return output.loss

        assert self.head is not None
        batch = self.data.batch(own, self._device)
        loss, _ = batch_loss(self._model, batch, share, bf16=self.loop.bf16, head=self.head)
        return loss

    def _aggregate(self, seen: Pass, indices: Sequence[int]) -> float:
        loss = self._numbers.aggregate(seen.of(seen.per_pair, indices)).item()
        return loss + self.loss.nll * self._nll(seen, indices) if self.loss.nll else loss

    def _watch(self, gap: float, seen: Pass) -> None:
        """Tells once of a radius that breaks the model. Each loss is measured by itself: IPO's are 1 / (4 beta^2)."""
        if self._told_of_gap or gap <= 0:
            return
        indifferent = self._indifferent(seen)
        if gap > BLOWN_UP * indifferent:
            self._told_of_gap = True
            if self._ranks.is_main:
                note(
                    f"the perturbation raises the loss by {gap:.3g} (`gap` in metrics.jsonl), and a model that prefers "
                    f"nothing has {indifferent:.3g}: the update is that of a broken model; find a smaller rho, see "
                    "`shapo sharpness`"
                )

    def _indifferent(self, seen: Pass) -> float:
        """The loss of the pairs seen where no response is preferred, and the chosen ones are as likely as they are."""
        zeros = torch.zeros(len(seen.indices), dtype=torch.float64, device=self._device)
        even = PairLogps(zeros, zeros, torch.ones_like(zeros), torch.ones_like(zeros))
        reference = even if self.loss.uses_reference else None
        rewards = None if self.rewards is None else self.rewards[seen.indices]
        loss = self._numbers.aggregate(self._numbers(make_batch(even, reference, rewards)).per_pair).item()
        return loss + self.loss.nll * self._nll(seen, seen.indices) if self.loss.nll else loss

    def _nll(self, seen: Pass, indices: Sequence[int]) -> float:
        return -seen.of(seen.chosen, indices).double().sum().item() / max(1, self.data.chosen_tokens(indices))

    def _whole_batch(
        self, parts: Sequence[tuple[Sequence[int], Sequence[int] | None]], indices: Sequence[int]
    ) -> losses.WholeBatch | None:
        """What micro-batches must know of all the pairs, `indices`; Dr.DPO's need one more forward pass for it.

        Args:
            parts: This rank's pairs of each micro-batch, and which of them are looked at; None for all.
            indices: The pairs of all micro-batches and ranks.
        """
        tokens = torch.tensor(self.data.chosen_tokens(indices), dtype=torch.float64, device=self._device)
        if not self._objective.needs_whole_batch:
            # Shares by the numbers of pairs and of tokens, which may differ in the last micro-batch.
            pairs = torch.tensor(len(indices), dtype=torch.float64, device=self._device)
            return losses.WholeBatch(torch.zeros_like(pairs), pairs, self._ranks.count, None, tokens)
        if len(parts) == 1:
            return None
        random = RandomState(self._device)
        with torch.no_grad():
            per_pair = [self._forward(own, None, rows)[1].per_pair for own, rows in parts]
        random.restore()
        return replace(self._objective.whole_batch(per_pair), chosen_tokens=tokens)

    def _own(self, micro: Sequence[int]) -> list[int]:
        """This rank's share of a micro-batch."""
        return [micro[i] for i in self._ranks.share(len(micro))]

    def _fed(self, own: Sequence[int]) -> Sequence[int]:
        return own or [self._stand_in]

    def _forward(
        self, own: Sequence[int], whole: losses.WholeBatch | None, rows: Sequence[int] | None = None
    ) -> tuple[PairLogps, losses.PreferenceOutput]:
        """Of this rank's pairs of a micro-batch, or of some of them by their positions; there may be none."""
        policy = self._logps(self._fed(own), rows if rows is None else rows or [0])
        counted = own if rows is None else [own[i] for i in rows]
        if not counted:
            policy = policy[[]]
        return policy, self._output(policy, counted, whole)

    def _output(
        self, policy: PairLogps, pairs: Sequence[int], whole: losses.WholeBatch | None
    ) -> losses.PreferenceOutput:
        reference = None if self.reference is None else self.reference[pairs]
        rewards = None if self.rewards is None else self.rewards[pairs]
        return self._objective(make_batch(policy, reference, rewards), whole=whole)

    def _logps(self, micro: Sequence[int], rows: Sequence[int] | None = None) -> PairLogps:
        batch = self.data.batch(micro, self._device)
        if rows is not None:
            both = torch.tensor([*rows, *(len(micro) + i for i in rows)], device=self._device)
            batch = {name: value[both] for name, value in batch.items()}
        return batch_logps(self._model, batch, bf16=self.loop.bf16, head=self.head)
