"""Supervised fine-tuning on preferred (or all) responses: cross-entropy per response token, on one process or ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapo.checked import checked
from shapo.config import LoopConfig, identity
from shapo.data.tokens import Encoded, PairEncoder, warn_of_cuts
from shapo.errors import UserError
from shapo.models.adapters import adapter_identity
from shapo.models.fused_head import FusedHead, find_fused_head
from shapo.models.modes import evaluating
from shapo.ranks import Ranks
from shapo.scoring.logps import response_logps
from shapo.storage.fingerprint import digest_model, digest_rows
from shapo.training.engine import Engine
from shapo.training.loop import Loop, Save, read_state
from shapo.training.optimizers import make_scheduler
from shapo.training.order import split
from shapo.training.rounding import StepRounding


@checked
def train_sft(
    model: torch.nn.Module,
    encoder: PairEncoder,
    examples: Sequence[tuple[str, str]],
    *,
    config: LoopConfig,
    output: Path,
    held_out: Sequence[tuple[str, str]] = (),
    measure: Callable[[int], dict[str, Any]] | None = None,
    save: Save | None = None,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Trains `model` in place to give the responses of `examples`, (prompt, response) each.

    An evaluation logs the loss on `held_out`, and what `measure` gives when it is told the number of updates made.

    The loss of an update is the mean over all response tokens of its batch, so micro-batches change nothing.  Writes
    `metrics.jsonl` and checkpoints under `output`; `save(model)` is called as soon as the weights are final, on rank 0
    with the whole model. Every rank of a launched run calls this with the same arguments.

    Raises:
        UserError: No examples, a loss or gradient that is not finite, or see `Loop.train`.
    """
    if not examples:
        raise UserError("there are no examples to fine-tune on")
    rows = [encoder.encode(prompt, response) for prompt, response in examples]
    checks = [encoder.encode(prompt, response) for prompt, response in held_out]
    warn_of_cuts([*rows, *checks], encoder.max_length)
    ranks = Ranks.here()
    run = {
        "kind": "sft",
        "model": ranks.on_main(lambda: digest_model(model)),
        "data": digest_rows([row.prompt_length, *row.input_ids] for row in rows),
        **adapter_identity(model),
        **identity(config),
    }
    state = read_state(output, run, ranks, resume=resume)
    whole, total_updates = config.micro_batch(ranks.count), config.total_updates(len(rows))
    each = -(-whole // ranks.count)
    engine = Engine(model, config, each)
    head = find_fused_head(engine.model, config.fused_head)
    optimizer = engine.plain()
    scheduler = make_scheduler(optimizer, config, total_updates)
    rounding = StepRounding(engine.model.parameters(), scheduler, warmup=config.warmup, total=total_updates)
    loop = Loop(engine, optimizer, scheduler, config, len(rows), run, output)

    def loss_sum(examples: Sequence[Encoded]) -> Tensor:
        """Of this rank's share; over a stand-in, and 0, where it has none, so that every rank runs every pass."""
        own = [examples[i] for i in ranks.share(len(examples))]
        found = _loss_sum(engine.model, encoder, own or examples[:1], bf16=config.bf16, head=head)
        return found if own else 0 * found

    def update(indices: list[int]) -> dict[str, Any]:
        tokens = sum(_response_tokens(rows[index]) for index in indices)
        total = torch.zeros((), dtype=torch.float64)
        micro_batches = split(indices, whole)
        for number, micro in enumerate(micro_batches, 1):
            with engine.accumulating(last=number == len(micro_batches)):
                # The ranks' gradients are averaged, and their shares are to be added up.
                loss = loss_sum([rows[index] for index in micro]) * ranks.count / tokens
                engine.backward(loss)
            total += loss.item()
        mean = ranks.summed(total).item() / ranks.count
        if not math.isfinite(mean):
            raise UserError(f"the loss is {mean}: training has diverged; lower the learning rate")
        return {"loss": mean, "tokens": tokens, **engine.step(optimizer, rounding)}

    def evaluate(done: int) -> dict[str, Any]:
        return (_held_out_loss() if checks else {}) | (measure(done) if measure else {})

    def _held_out_loss() -> dict[str, float]:
        with evaluating(engine.model), torch.no_grad():
            batches = [checks[start : start + whole] for start in range(0, len(checks), whole)]
            total = torch.tensor([sum(loss_sum(batch).item() for batch in batches)], dtype=torch.float64)
        return {"loss": ranks.summed(total).item() / sum(_response_tokens(row) for row in checks)}

    def check() -> float:
        with evaluating(engine.model), torch.no_grad():
            return _loss_sum(engine.model, encoder, rows[:each], bf16=config.bf16, head=head).item()

    watch = evaluate if checks or measure else None
    loop.train(update, watch, state=state, save=save, check=check, progress=progress, name="sft")


def _loss_sum(
    model: torch.nn.Module, encoder: PairEncoder, rows: Sequence[Encoded], *, bf16: bool, head: FusedHead | None
) -> Tensor:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in encoder.collate(rows).items()}
    sums, _ = response_logps(model, batch, bf16=bf16, head=head)
    return -sums.sum()


def _response_tokens(row: Encoded) -> int:
    # The token at position 0 is predicted by nothing, so a response without a prompt has one target less than tokens.
    return len(row) - max(row.prompt_length, 1)
