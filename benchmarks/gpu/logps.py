"""Log-probabilities on the GPU, forward and backward: from logits, and a DPO loss from hidden states and the head.

Liger's chunked DPO and cut-cross-entropy (its filter off) are measured where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import IGNORE, eager, peers
from benchmarks.gpu.bench import Bench
from shapo_kernels import backends, losses

Step = Callable[[], tuple[Tensor, ...]]


def sequence_logps(bench: Bench) -> None:
    shapes = [(2, 8, 70)] if bench.small else [(8, 512, 32000), (4, 512, 128256)]
    for dtype in (torch.bfloat16, torch.float32):
        for rows, tokens, vocabulary in shapes:
            values = 3 * torch.randn(rows, tokens, vocabulary, device=bench.device)
            values, labels = values.to(dtype).requires_grad_(), _labels(bench, rows, tokens, vocabulary)
            upstream = torch.linspace(-1, 1, rows, device=bench.device)

            def step(logps: Callable[[Tensor, Tensor], Tensor], backend: str = "reference") -> Step:
                def run() -> tuple[Tensor, ...]:
                    with backends.use(backend), torch.enable_grad():
                        sums = logps(values, labels)  # noqa: B023
                        return (sums.detach(), *torch.autograd.grad((sums * upstream).sum(), values))  # noqa: B023

                return run  # noqa: B023

            steps = {f"shapo_kernels, {name}": step(_ours, name) for name in bench.backends}
            steps |= {"eager": step(eager), "compiled": step(bench.compile(eager))}
            # A row's truth in float64 is enough: all of them would not fit beside the logits.
            exact = values.detach()[-1:].double().requires_grad_()
            with torch.enable_grad():
                sums = eager(exact, labels[-1:])
                truth = (sums.detach(), *torch.autograd.grad((sums * upstream[-1]).sum(), exact))
            bench.compare(
                "gpu_sequence_logps",
                f"{rows} x {tokens} x {vocabulary} {_name(dtype)}",
                {name: (run, _agrees(run, truth, _room(dtype), last=1)) for name, run in steps.items()},
                next(iter(steps)),
                bytes=3 * values.nbytes,  # read by each pass, and the gradient written
                dtype=_name(dtype),
                shape=[rows, tokens, vocabulary],
            )


def linear_sequence_logps(bench: Bench) -> None:
    rows, tokens, vocabulary, width = (2, 8, 70, 16) if bench.small else (8, 512, 128256, 2048)
    dtype = torch.bfloat16
    hidden = torch.randn(rows, tokens, width, device=bench.device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=bench.device) * width**-0.5).to(dtype).requires_grad_()
    labels = _labels(bench, rows, tokens, vocabulary)

    def dpo(sums: Tensor) -> Tensor:
        chosen, rejected = sums.chunk(2)
        nothing = torch.zeros_like(chosen)
        return losses.dpo(chosen, rejected, nothing, nothing, beta=0.1).mean()

    def step(loss: Callable[[], Tensor], backend: str = "reference") -> Step:
        def run() -> tuple[Tensor, ...]:
            with backends.use(backend), torch.enable_grad():
                return torch.autograd.grad(loss(), (hidden, weight))

        return run

    ways: dict[str, Step] = {
        f"shapo_kernels, {name}": step(lambda: dpo(losses.linear_sequence_logps(hidden, weight, labels)[0]), name)
        for name in bench.backends
    }
    ways["eager"] = step(lambda: dpo(eager(hidden @ weight.t(), labels)))
    with torch.enable_grad():  # the runner times without
        others = peers(hidden, weight, labels, dpo)
    if bench.small:
        others.pop("cut-cross-entropy", None)  # on a CPU it would spend a dry run on compiling
    ways |= {name: step(loss) for name, loss in others.items()}
    wide = [hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    with torch.enable_grad():
        truth = torch.autograd.grad(dpo(eager(wide[0] @ wide[1].t(), labels)), wide)
    bench.compare(
        "gpu_linear_sequence_logps",
        f"{rows} x {tokens} x {vocabulary}, width {width}, bfloat16",
        {name: (run, _agrees(run, truth, 2e-2)) for name, run in ways.items()},
        next(iter(ways)),
        dtype="bfloat16",
        shape=[rows, tokens, vocabulary, width],
    )


def _ours(logits: Tensor, labels: Tensor) -> Tensor:
    return losses.sequence_logps(logits, labels)[0]


def _labels(bench: Bench, rows: int, tokens: int, vocabulary: int) -> Tensor:
    labels = torch.randint(0, vocabulary, (rows, tokens), device=bench.device)
    labels[:, : tokens // 4] = IGNORE  # a prompt
    return labels


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _room(dtype: torch.dtype) -> float:
    """Of a gradient that is rounded to the dtype once."""
    return 4e-3 if dtype == torch.bfloat16 else 1e-5


def _agrees(run: Step, truth: tuple[Any, ...], room: float, last: int = 0) -> Callable[[], None]:
    """Relative error in the 2-norm of each result, or of its ``last`` rows."""

    def check() -> None:
        for number, (got, expected) in enumerate(zip(run(), truth, strict=True)):
            wrong = ((got[-last:].to(expected.dtype) - expected).norm() / expected.norm()).item()
            if not wrong <= room:
                raise AssertionError(f"result {number} is wrong by {wrong:.1e}, {room:.1e} allowed")

    return check
