"""Supervised fine-tuning on preferred (or all) responses: cross-entropy per response token, one model, one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapo.config import LoopConfig, identity
from shapo.data.tokens import Encoded, PairEncoder, warn_of_cuts
from shapo.errors import UserError
from shapo.models.adapters import adapter_identity
from shapo.models.fused_head import FusedHead, find_fused_head
from shapo.models.modes import evaluating
from shapo.scoring.logps import response_logps
from shapo.storage.fingerprint import digest_model, digest_rows
from shapo.training.loop import Loop, Save, read_state
from shapo.training.optimizers import clip_gradients, make_optimizer, make_scheduler, require_finite
from shapo.training.order import split
from shapo.training.rounding import StepRounding


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
    `metrics.jsonl` and checkpoints under `output`; `save()` is called as soon as the weights are final.

    Raises:
        UserError: No examples, a loss or gradient that is not finite, or see `Loop.train`.
    """
    if not examples:
        raise UserError("there are no examples to fine-tune on")
    rows = [encoder.encode(prompt, response) for prompt, response in examples]
    checks = [encoder.encode(prompt, response) for prompt, response in held_out]
    warn_of_cuts([*rows, *checks], encoder.max_length)
    head = find_fused_head(model, config.fused_head)
    optimizer = make_optimizer(model.parameters(), config)
    run = {
        "kind": "sft",
        "model": digest_model(model),
        "data": digest_rows([row.prompt_length, *row.input_ids] for row in rows),
        **adapter_identity(model),
        **identity(config),
    }
    state = read_state(output, run, resume=resume)
    total_updates = config.total_updates(len(rows))
    scheduler = make_scheduler(optimizer, config, total_updates)
    rounding = StepRounding(model.parameters(), scheduler, warmup=config.warmup, total=total_updates)
    loop = Loop(model, optimizer, scheduler, config, len(rows), run, output)

    def update(indices: list[int]) -> dict[str, Any]:
        tokens = sum(_response_tokens(rows[index]) for index in indices)
        total = 0.0
        for micro in split(indices, config.micro_batch_size):
            loss = _loss_sum(model, encoder, [rows[index] for index in micro], bf16=config.bf16, head=head) / tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise UserError(f"the loss is {total}: training has diverged; lower the learning rate")
        norm = clip_gradients(model.parameters(), config.clip)
        require_finite(norm)
        moved = rounding.step(optimizer)
        optimizer.zero_grad()
        return {"loss": total, "grad_norm": norm.item(), "tokens": tokens, **moved}

    def evaluate(done: int) -> dict[str, Any]:
        return (_held_out_loss() if checks else {}) | (measure(done) if measure else {})

    def _held_out_loss() -> dict[str, float]:
        with evaluating(model), torch.no_grad():
            size = config.micro_batch_size or config.batch_size
            batches = [checks[start : start + size] for start in range(0, len(checks), size)]
            total = sum(_loss_sum(model, encoder, batch, bf16=config.bf16, head=head).item() for batch in batches)
        return {"loss": total / sum(_response_tokens(row) for row in checks)}

    def check() -> float:
        size = config.micro_batch_size or config.batch_size
        with evaluating(model), torch.no_grad():
            return _loss_sum(model, encoder, rows[:size], bf16=config.bf16, head=head).item()

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
