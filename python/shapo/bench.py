"""Operator microbenchmark behind `shapo bench`: every contender checked, then timed in turns in one process.

A number here is a ratio between contenders on one machine at one moment, and no property of the library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shapo.checked import checked
from shapo.errors import UserError
from shapo_kernels import Subspace, backends, ops


@dataclass(frozen=True)
class _Contender:
    """`call` does the work once; `result` is what the check compares."""

    name: str
    call: Callable[[], Any]
    result: Callable[[], Tensor]
    eager: bool


def require_memory(layers: int, hidden: int, intermediate: int, device: torch.device) -> None:
    """Refuses sizes that do not fit, which the system would answer by killing the process.

    Raises:
        UserError: Weights, gradients, masks and copies need more than is free.
    """
    needed = 5 * 4 * layers * hidden * intermediate
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise UserError(
            f"{layers} weights of {hidden} x {intermediate} need {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
            "free: lower --layers, --hidden or --intermediate"
        )


@checked
def run_benchmarks(
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    percent: float,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Times the subspace update (gather, norm, scale, perturb, restore) and the column cosine.

    Returns:
        `operators`: name to rows (`name`, `eager`, `median_ms`, `p20_ms`, `p80_ms`, `repeats`); `neurons`; `backends`.

    Raises:
        RuntimeError: A contender computes something else than the others; nothing is timed then.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = hidden**-0.5
    weights = [
        (torch.randn(hidden, intermediate, generator=generator) * scale).to(device, dtype) for _ in range(layers)
    ]
    gradients = [torch.randn(hidden, intermediate, generator=generator).to(device, dtype) for _ in range(layers)]
    direction = torch.randn(hidden, generator=generator).to(device)
    subspace = Subspace.random({str(layer): intermediate for layer in range(layers)}, percent, seed=seed, match="layer")
    indices = [subspace[str(layer)].to(device) for layer in range(layers)]
    suites = {
        "subspace update": _update_contenders(weights, gradients, indices, rho=0.05),
        "column cosine": _cosine_contenders(weights, direction),
    }
    for name, contenders in suites.items():
        _check(name, contenders)
    with tqdm(total=(repeats + 1) * sum(map(len, suites.values())), desc="bench", disable=not progress) as bar:
        timed = {name: _time(contenders, repeats, device, bar.update) for name, contenders in suites.items()}
    return {"operators": timed, "neurons": subspace.count, "backends": list(backends.available())}


def _update_contenders(
    weights: list[Tensor], gradients: list[Tensor], indices: list[Tensor], *, rho: float
) -> list[_Contender]:
    axes = [1] * len(weights)
    radius = torch.full((len(weights),), rho, dtype=torch.float64, device=weights[0].device)
    masks = [
        torch.zeros_like(weight).index_fill_(1, index, 1.0) for weight, index in zip(weights, indices, strict=True)
    ]

    def shapo(look: Callable[[], Any] = _nothing) -> Any:
        values, squares = ops.gather(gradients, indices, axes)
        backups = [torch.empty_like(value, dtype=weight.dtype) for value, weight in zip(values, weights, strict=True)]
        ops.perturb_(weights, indices, axes, values, ops.perturbation_scale(squares, radius), backups)
        seen = look()
        ops.restore_(weights, indices, axes, backups)
        return seen

    def selected(look: Callable[[], Any] = _nothing) -> Any:
        values = [g.index_select(1, i).float() for g, i in zip(gradients, indices, strict=True)]
        step = rho / torch.stack([value.square().sum() for value in values]).sum().sqrt()
        kept = [w.index_select(1, i) for w, i in zip(weights, indices, strict=True)]
        for weight, index, old, value in zip(weights, indices, kept, values, strict=True):
            weight.index_copy_(1, index, (old + value * step).to(weight.dtype))
        seen = look()
        for weight, index, old in zip(weights, indices, kept, strict=True):
            weight.index_copy_(1, index, old)
        return seen

    def masked(look: Callable[[], Any] = _nothing) -> Any:
        values = [gradient * mask for gradient, mask in zip(gradients, masks, strict=True)]
        step = rho / torch.stack([value.float().square().sum() for value in values]).sum().sqrt()
        kept = [weight.clone() for weight in weights]
        for weight, value in zip(weights, values, strict=True):
            weight.add_((value * step).to(weight.dtype))
        seen = look()
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
        return seen

    def moved() -> Tensor:
        return torch.stack([w.float().index_select(1, i).sum(1) for w, i in zip(weights, indices, strict=True)])

    ours = [
        _Contender(f"shapo, {name}", _using(name, shapo), _using(name, lambda: shapo(moved)), eager=False)
        for name in _usable(weights[0].device)
    ]
    return [
        *ours,
        _Contender("eager index_select/index_copy", selected, lambda: selected(moved), eager=True),
        _Contender("eager clone and mask", masked, lambda: masked(moved), eager=True),
    ]


def _cosine_contenders(weights: list[Tensor], direction: Tensor) -> list[_Contender]:
    def ours() -> Tensor:
        return torch.stack([ops.column_cosine(weight, direction) for weight in weights])

    def two_passes() -> Tensor:
        unit = direction / direction.norm()
        return torch.stack([(unit.to(w.dtype) @ w).float() / w.float().norm(dim=0) for w in weights])

    def library() -> Tensor:
        return torch.stack(
            [torch.nn.functional.cosine_similarity(w.float(), direction[:, None], dim=0) for w in weights]
        )

    shapo = [
        _Contender(f"shapo, {n}", _using(n, ours), _using(n, ours), eager=False) for n in _usable(weights[0].device)
    ]
    eager = [("eager matmul and norm", two_passes), ("eager cosine_similarity", library)]
    return [*shapo, *(_Contender(name, call, call, eager=True) for name, call in eager)]


def _check(name: str, contenders: list[_Contender]) -> None:
    truth = contenders[-1].result()
    # In low precision the eager forms round intermediate results; the check is for a wrong answer, not for the last
    # bit.
    for contender in contenders:
        error = (contender.result() - truth).norm() / truth.norm()
        if not error < 2e-2:
            raise RuntimeError(
                f"{name}: {contender.name} differs from {contenders[-1].name} by {error:.2g}; nothing is timed"
            )


def _time(
    contenders: list[_Contender], repeats: int, device: torch.device, tick: Callable[[], Any]
) -> list[dict[str, Any]]:
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(repeats + 1):
        for contender, times in zip(contenders, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            contender.call()
            _synchronize(device)
            if turn:  # the first turn warms up
                times.append(time.perf_counter() - start)
            tick()
    return [_row(contender, times) for contender, times in zip(contenders, seconds, strict=True)]


def _row(contender: _Contender, seconds: list[float]) -> dict[str, Any]:
    p20, p50, p80 = (
        torch.tensor(seconds, dtype=torch.float64).mul(1e3).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {
        "name": contender.name,
        "eager": contender.eager,
        "median_ms": p50,
        "p20_ms": p20,
        "p80_ms": p80,
        "repeats": len(seconds),
    }


def _usable(device: torch.device) -> list[str]:
    serving = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}
    return [name for name in backends.available() if name in serving.get(device.type, ("reference",))]


def _using(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with backends.use(name):
            return call()

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nothing() -> None:
    return None
