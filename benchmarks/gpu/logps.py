"""Log-probabilities on the GPU, forward and backward: from logits, and a DPO loss from hidden states and the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import IGNORE, eager, peers
from benchmarks.gpu.bench import Bench, Case, Run, Variant, name_of
from shapo_kernels import backends, losses

LOGITS = ((8, 512, 32000), (4, 512, 128256))
# Rows, tokens, vocabulary, width, and whether the head is frozen as in a selective ascent.
HEADS = ((8, 512, 128256, 2048, False), (8, 512, 128256, 2048, True), (8, 1024, 32000, 4096, False))
Summed = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Logits:
    values: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        self.upstream = torch.linspace(-1, 1, len(self.values), device=self.values.device)


def sequence_logps(bench: Bench) -> None:
    shapes = ((2, 8, 70),) if bench.small else LOGITS
    compiled = bench.compile(eager)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in shapes:

            def inputs(number: int, shape: tuple[int, int, int] = shape, dtype: torch.dtype = dtype) -> Logits:
                generator = torch.Generator(bench.device).manual_seed(number)
                values = 3 * torch.randn(shape, generator=generator, device=bench.device)
                return Logits(values.to(dtype).requires_grad_(), _labels(generator, *shape))

            room = 4e-3 if dtype == torch.bfloat16 else 1e-5  # of a gradient that is rounded to the dtype once
            check = close_to(_one_row_exactly, room, last=1)
            size = dtype.itemsize * shape[0] * shape[1] * shape[2]
            columns = {
                "dtype": name_of(dtype),
                "shape": list(shape),
                "bytes": 3 * size,  # read by each pass, and the gradient written
            }
            variants = [
                *bench.ours(_step(_ours), check),
                Variant("eager", _step(eager), check),
                Variant("compiled", _step(compiled), check, later=True),
            ]
            name = f"{' x '.join(map(str, shape))} {name_of(dtype)}"
            bench.compare(Case("gpu_sequence_logps", name, inputs, 3 * size, variants, columns))


def _step(logps: Summed) -> Callable[[Logits], Run]:
    def bind(given: Logits) -> Run:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                sums = logps(given.values, given.labels)
                return (sums.detach(), *torch.autograd.grad((sums * given.upstream).sum(), given.values))

        return run

    return bind


def _ours(logits: Tensor, labels: Tensor) -> Tensor:
    return losses.sequence_logps(logits, labels)[0]


def _one_row_exactly(given: Logits) -> tuple[Tensor, ...]:
    """The last row in float64: all of them would not fit beside the logits."""
    exact = given.values.detach()[-1:].double().requires_grad_()
    with torch.enable_grad():
        sums = eager(exact, given.labels[-1:])
        return (sums.detach(), *torch.autograd.grad((sums * given.upstream[-1]).sum(), exact))


@dataclass
class Head:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    frozen: bool

    def inputs(self) -> list[Tensor]:
        return [self.hidden] if self.frozen else [self.hidden, self.weight]


def dpo(sums: Tensor) -> Tensor:
    chosen, rejected = sums.chunk(2)
    nothing = torch.zeros_like(chosen)
    return losses.dpo(chosen, rejected, nothing, nothing, beta=0.1).mean()


def linear_sequence_logps(bench: Bench) -> None:
    for rows, tokens, vocabulary, width, frozen in ((2, 8, 70, 16, False),) if bench.small else HEADS:
        shape = (rows, tokens, vocabulary, width)

        def inputs(number: int, shape: tuple[int, ...] = shape, frozen: bool = frozen) -> Head:
            rows, tokens, vocabulary, width = shape
            generator = torch.Generator(bench.device).manual_seed(number)
            make = lambda *s: torch.randn(s, generator=generator, device=bench.device)  # noqa: E731
            hidden = make(rows, tokens, width).bfloat16().requires_grad_()
            weight = (make(vocabulary, width) * width**-0.5).bfloat16().requires_grad_(not frozen)
            return Head(hidden, weight, _labels(generator, rows, tokens, vocabulary), frozen)

        check = close_to(_dpo_in_fp32, 2e-2)
        logits = rows * tokens * vocabulary * 4
        variants = [
            *bench.ours(_head(_by_tiles), check),
            *bench.ours(_head(partial(_by_tiles, chunk_bytes=logits // 32)), check, ", tiles of 1/32 of the logits"),
            *([] if frozen else bench.ours(_loss(_by_pairs), check, ", by pairs")),
            *bench.ours(_several_launches_a_tile(_head(_by_tiles)), check, ", several launches a tile"),
            Variant("eager", _head(lambda h: eager(h.hidden @ h.weight.t(), h.labels)), check),
            *(Variant(name, bind, check, later=later) for name, bind, later in _peers(bench)),
        ]
        columns = {"dtype": "bfloat16", "shape": list(shape)}
        name = f"{rows} x {tokens} x {vocabulary}, width {width}{', head frozen' if frozen else ''}, bfloat16"
        held = 2 * (vocabulary + rows * tokens) * width * 2
        bench.compare(Case("gpu_linear_sequence_logps", name, inputs, held, variants, columns))


def _by_tiles(head: Head, chunk_bytes: int | None = None) -> Tensor:
    return losses.linear_sequence_logps(head.hidden, head.weight, head.labels, chunk_bytes=chunk_bytes)[0]


def _by_pairs(head: Head) -> Tensor:
    """As many pairs at once as `chunk_bytes` holds by default, but at least one."""
    rows, tokens = head.labels.shape
    room = max(256 << 20, 2 * tokens * len(head.weight) * 4)

    def share(sums: Tensor, *_: Tensor) -> Tensor:
        return dpo(sums) * (len(sums) / rows)

    return losses.linear_preference_loss(head.hidden, head.weight, head.labels, share, chunk_bytes=room)[0]


def _several_launches_a_tile(bind: Callable[[Head], Run]) -> Callable[[Head], Run]:
    """As where no backend has one kernel for a tile: what that saves."""

    def bound(head: Head) -> Run:
        run = bind(head)

        def without() -> tuple[Tensor, ...]:
            functions = backends._functions.get("triton", {})
            kernel = functions.pop("linear_tile", None)
            try:
                return run()
            finally:
                if kernel is not None:
                    functions["linear_tile"] = kernel

        return without

    return bound


def _head(sums: Callable[[Head], Tensor]) -> Callable[[Head], Run]:
    return _loss(lambda head: dpo(sums(head)))


def _loss(loss: Callable[[Head], Tensor]) -> Callable[[Head], Run]:
    def bind(head: Head) -> Run:
        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(loss(head), head.inputs())

        return run

    return bind


def _peers(bench: Bench) -> list[tuple[str, Callable[[Head], Run], bool]]:
    """Those that are installed; in a dry run without cut-cross-entropy, which would spend it on compiling."""
    one = torch.zeros(2, 2, 1, device=bench.device)
    names = peers(one, one[0], torch.zeros(2, 2, dtype=torch.int64, device=bench.device), dpo)
    if bench.small:
        names.pop("cut-cross-entropy", None)

    def bind(name: str) -> Callable[[Head], Run]:
        return _loss(lambda head: peers(head.hidden, head.weight, head.labels, dpo)[name]())

    return [(name, bind(name), name.startswith(("cut", "Liger"))) for name in names]  # they compile


def _dpo_in_fp32(head: Head) -> tuple[Tensor, ...]:
    wide = Head(head.hidden.detach().float().requires_grad_(), head.weight.detach().float(), head.labels, head.frozen)
    wide.weight.requires_grad_(not head.frozen)
    return _head(lambda h: eager(h.hidden @ h.weight.t(), h.labels))(wide)()


def _labels(generator: torch.Generator, rows: int, tokens: int, vocabulary: int) -> Tensor:
    labels = torch.randint(0, vocabulary, (rows, tokens), generator=generator, device=generator.device)
    labels[:, : tokens // 4] = IGNORE  # a prompt
    return labels


def close_to(truth: Callable[[Any], tuple[Tensor, ...]], room: float, last: int = 0) -> Callable[[Any, Run], None]:
    """A check: relative error in the 2-norm of each result, or of its `last` rows."""

    def check(inputs: Any, run: Run) -> None:
        expected = truth(inputs)
        for number, (got, right) in enumerate(zip(run(), expected, strict=True)):
            wrong = ((got[-last:].to(right.dtype) - right).norm() / right.norm()).item()
            if not wrong <= room:
                raise AssertionError(f"result {number} is wrong by {wrong:.1e}, {room:.1e} allowed")

    return check
