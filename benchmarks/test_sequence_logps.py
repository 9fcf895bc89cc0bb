"""Log-probabilities of sequences, forward and backward: from logits, and from hidden states and the head's weight.

python -m pytest benchmarks/test_sequence_logps.py

Every variant is checked before it is timed: our error against float64 must not exceed eager's. Liger's chunked DPO
and cut-cross-entropy (its filter off) are measured where they are installed (`pip install liger-kernel
cut-cross-entropy`). Of the head, `an eighth of the logits` shows what larger batches pay for memory: the logits
computed twice. `by pairs` is `linear_preference_loss`, a quarter of the logits at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import IGNORE, eager, peers
from benchmarks.measure import peak_extra_bytes
from benchmarks.rows import add, interleaved, ratios, row, write
from shapo_kernels import backends, losses

ROUNDS = 5
OURS = "shapo_kernels"


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    tokens: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    width: int = 0
    kept: float = 1.0
    frozen: bool = False


LOGITS = [
    Case("4x128x32000 fp32", 4, 128, 32000),
    Case("4x128x32000 bf16", 4, 128, 32000, torch.bfloat16),
    Case("4x128x32000 fp32, half ignored", 4, 128, 32000, kept=0.5),
    Case("1x128x128256 fp32", 1, 128, 128256),
    Case("1x128x128256 bf16", 1, 128, 128256, torch.bfloat16),
    Case("1x64x262144 bf16", 1, 64, 262144, torch.bfloat16),
    Case("8x32x1000 fp32", 8, 32, 1000),
]
HEADS = [
    Case("8x64x32000, width 256 fp32", 8, 64, 32000, width=256),
    Case("8x64x32000, width 512 fp32", 8, 64, 32000, width=512),
    Case("8x64x32000, width 512 fp32, frozen", 8, 64, 32000, width=512, frozen=True),
    Case("8x64x32000, width 512 fp32, half ignored", 8, 64, 32000, width=512, kept=0.5),
    Case("8x8x32000, width 128 bf16", 8, 8, 32000, torch.bfloat16, width=128),
    Case("8x64x128256, width 64 fp32", 8, 64, 128256, width=64),
    Case("8x64x128256, width 512 fp32", 8, 64, 128256, width=512),
    Case("2x64x128256, width 2048 fp32", 2, 64, 128256, width=2048),
]
# Of a preference step, whose logits do not fit into one tile: fewer others are held against ours, for a round takes a
# minute.
STEPS = [
    Case("8x512x32000, width 512 fp32", 8, 512, 32000, width=512),
    Case("8x512x128256, width 256 fp32", 8, 512, 128256, width=256),
    Case("8x512x128256, width 256 fp32, half ignored", 8, 512, 128256, width=256, kept=0.5),
]
# Smaller ones, of whose logits a quarter fits.
QUARTERS = [
    Case("8x32x64000, width 256 fp32, tiles of a quarter", 8, 32, 64000, width=256),
    Case("8x32x32000, width 1024 fp32, tiles of a quarter", 8, 32, 32000, width=1024),
    Case("8x32x64000, width 256 fp32, half ignored, tiles of a quarter", 8, 32, 64000, width=256, kept=0.5),
]
_logits_rows: list[dict[str, Any]] = []
_head_rows: list[dict[str, Any]] = []
_step_rows: list[dict[str, Any]] = []


def make(case: Case, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(case.rows, case.tokens, *shape, generator=generator).to(case.dtype)
    labels = torch.randint(0, case.vocabulary, (case.rows, case.tokens), generator=generator)
    labels[:, : round(case.tokens * (1 - case.kept))] = IGNORE
    return values, labels


@pytest.mark.parametrize("case", LOGITS, ids=lambda case: case.name)
def test_sequence_logps(benchmark: Any, case: Case) -> None:
    values, labels = make(case, case.vocabulary)
    values.mul_(3).requires_grad_()
    upstream = torch.linspace(-1, 1, case.rows)

    def step(logps: Callable[[Tensor], Tensor], above: bool = False) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            # Overwriting needs logits that something made: here a copy, which every variant is given.
            logits = values.view_as(values) if not above else values.clone()
            sums = logps(logits)
            (grad,) = torch.autograd.grad((sums * upstream).sum(), logits)
            return sums.detach(), grad

        return run

    compiled = torch.compile(eager, fullgraph=True)
    runs = {
        "eager": step(lambda x: eager(x, labels)),
        "eager, compiled": step(lambda x: compiled(x, labels)),
        OURS: step(lambda x: losses.sequence_logps(x, labels)[0]),
        f"{OURS}, in place (and a copy)": step(
            lambda x: losses.sequence_logps(x, labels, in_place=True)[0], above=True
        ),
    }
    truth = values.detach().double().requires_grad_()
    exact = eager(truth, labels)
    (exact_grad,) = torch.autograd.grad((exact * upstream).sum(), truth)
    found = {name: run() for name, run in runs.items()}
    errors = {name: (sums.double() - exact).abs().max().item() for name, (sums, _) in found.items()}
    slopes = {name: (grad.double() - exact_grad).abs().max().item() for name, (_, grad) in found.items()}
    del truth, exact_grad, found
    for name in runs:
        room = 1 if name.startswith(OURS) else 10
        assert errors[name] <= room * errors["eager"], f"{name} is wrong by {errors[name]}, eager by {errors['eager']}"
        assert slopes[name] <= room * slopes["eager"], f"{name}'s gradient is wrong by {slopes[name]}"
    seconds = interleaved(runs, rounds=ROUNDS)
    for name, times in seconds.items():
        columns = {
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": [case.rows, case.tokens, case.vocabulary],
            "backend": backends.serving("cpu"),
            "times_ours": ratios(seconds, OURS)[name],
            "max_error": errors[name],
            # Beyond the gradient, which every variant returns, in shares of the logits.
            "extra_of_logits": peak_extra_bytes(runs[name]) / values.nbytes - 1,
        }
        _logits_rows.append(row("sequence_logps", case.name, name, times, **columns))
    write("sequence_logps", _logits_rows)
    benchmark.group = case.name
    benchmark.extra_info.update({"times_ours": ratios(seconds, OURS)})
    benchmark.pedantic(runs[OURS], rounds=3)


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_linear_sequence_logps(benchmark: Any, case: Case) -> None:
    hidden, labels = make(case, case.width)
    weight = torch.randn(case.vocabulary, case.width, generator=torch.Generator().manual_seed(1))
    weight = (weight * case.width**-0.5).to(case.dtype)
    inputs = [hidden.requires_grad_()] if case.frozen else [hidden.requires_grad_(), weight.requires_grad_()]
    eighth = int((labels[:, 1:] != IGNORE).sum()) * case.vocabulary * 4 // 8

    def dpo(sums: Tensor) -> Tensor:
        chosen, rejected = sums.chunk(2)
        nothing = torch.zeros_like(chosen)
        return losses.dpo(chosen, rejected, nothing, nothing, beta=0.1).mean()

    variants: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: dpo(eager(hidden @ weight.t(), labels)),
        "head, then sequence_logps in place": lambda: dpo(
            losses.sequence_logps(hidden @ weight.t(), labels, in_place=True)[0]
        ),
        OURS: lambda: dpo(losses.linear_sequence_logps(hidden, weight, labels)[0]),
        f"{OURS}, an eighth of the logits": lambda: dpo(
            losses.linear_sequence_logps(hidden, weight, labels, chunk_bytes=eighth)[0]
        ),
        f"{OURS}, by pairs": lambda: losses.linear_preference_loss(
            hidden, weight, labels, lambda sums, *_: dpo(sums) * (len(sums) / case.rows), chunk_bytes=2 * eighth
        )[0],
        **peers(hidden, weight, labels, dpo),
    }
    runs = {name: lambda loss=loss: torch.autograd.grad(loss(), inputs) for name, loss in variants.items()}
    exact_inputs = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    exact = torch.autograd.grad(dpo(eager(exact_inputs[0] @ exact_inputs[1].t(), labels)), exact_inputs)
    room = 2e-2 if case.dtype == torch.bfloat16 else 1e-3
    for name, run in runs.items():
        for got, expected in zip(run(), exact, strict=False):
            wrong = (got.double() - expected).norm() / expected.norm()
            assert wrong < room, f"the gradient of {name} is wrong by {wrong:.1e}"
    del exact, exact_inputs
    seconds = interleaved(runs, rounds=ROUNDS)
    memory = {name: peak_extra_bytes(run) for name, run in runs.items()}
    for name, times in seconds.items():
        columns = {
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": [case.rows, case.tokens, case.vocabulary, case.width],
            "backend": backends.serving("cpu"),
            "times_ours": ratios(seconds, OURS)[name],
            **memory_columns(memory, name, inputs),
        }
        _head_rows.append(row("linear_sequence_logps", case.name, name, times, **columns))
    add("linear_sequence_logps", _head_rows)
    benchmark.group = case.name
    benchmark.extra_info.update({"times_ours": ratios(seconds, OURS)})
    benchmark.pedantic(runs[OURS], rounds=3)


def memory_columns(memory: dict[str, int], name: str, inputs: list[Tensor]) -> dict[str, float]:
    """Beyond the inputs; and beyond their gradients too, which every variant must return."""
    gradients = sum(tensor.nbytes for tensor in inputs)
    return {
        "extra_bytes": memory[name],
        "of_eager_memory": memory[name] / memory["eager"],
        "of_eager_beyond": (memory[name] - gradients) / (memory["eager"] - gradients),
    }


@pytest.mark.parametrize("case", [*STEPS, *QUARTERS], ids=lambda case: case.name)
def test_linear_sequence_logps_step(benchmark: Any, case: Case) -> None:
    hidden, labels = make(case, case.width)
    weight = torch.randn(case.vocabulary, case.width, generator=torch.Generator().manual_seed(1)) * case.width**-0.5
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    upstream = torch.linspace(-1, 1, case.rows)
    quarter = int((labels[:, 1:] != IGNORE).sum()) * case.vocabulary * 4 // 4
    chunk_bytes = quarter if case in QUARTERS else None

    def whole(sums: Tensor) -> Tensor:
        return (sums * upstream).sum()

    variants = {
        "eager": lambda: whole(eager(hidden @ weight.t(), labels)),
        OURS: lambda: whole(losses.linear_sequence_logps(hidden, weight, labels, chunk_bytes=chunk_bytes)[0]),
        f"{OURS}, by pairs": lambda: losses.linear_preference_loss(
            hidden,
            weight,
            labels,
            lambda sums, _, prompts: (sums * upstream.view(2, -1)[:, prompts].flatten()).sum(),
            chunk_bytes=chunk_bytes,
        )[0],
        **{name: run for name, run in peers(hidden, weight, labels, whole).items() if name.startswith("torch")},
    }
    found: dict[str, tuple[Tensor, ...]] = {}

    def runner(name: str) -> Callable[[], None]:
        def run() -> None:
            found[name] = torch.autograd.grad(variants[name](), inputs)

        return run

    runs, memory = {name: runner(name) for name in variants}, {}
    for name, run in runs.items():
        memory[name] = peak_extra_bytes(run)
    for name in variants:
        for got, expected in zip(found[name], found["eager"], strict=True):
            wrong = (got - expected).norm() / expected.norm()
            assert wrong < 1e-4, f"the gradient of {name} differs from eager's by {wrong:.1e}"
    found.clear()
    seconds = interleaved(runs, rounds=2 if case in STEPS else ROUNDS, warmup=0)
    for name, times in seconds.items():
        columns = {
            "dtype": "float32",
            "shape": [case.rows, case.tokens, case.vocabulary, case.width],
            "backend": backends.serving("cpu"),
            "times_ours": ratios(seconds, OURS)[name],
            **memory_columns(memory, name, inputs),
        }
        _step_rows.append(row("linear_sequence_logps_step", case.name, name, times, **columns))
    add("linear_sequence_logps_step", _step_rows)
    benchmark.group = case.name
    benchmark.extra_info.update({"times_ours": ratios(seconds, OURS)})
    benchmark.pedantic(lambda: None, rounds=1)
