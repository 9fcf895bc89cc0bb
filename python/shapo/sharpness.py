"""How much the loss rises when weights move a distance rho along its gradient, inside a subspace: Figure 1 of
arXiv:2602.07340.

For a subspace S and the gradient g of the same batch of pairs,

    increase(S, rho) = L(theta + rho * g_S / ||g_S||) - L(theta),      share(S, rho) = increase(S, rho) / increase(all,
    rho).

Radii are measured twice: as they are, and as multiples of ||W_S||, the norm of the weights that S selects, because a
radius says little without it: one per cent of the neurons at a given rho move far more, each, than all weights do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shapo.errors import UserError
from shapo.models.fused_head import find_fused_head
from shapo.models.modes import evaluating
from shapo.scoring.logps import PairLogps, TokenizedPairs, batch_logps
from shapo_kernels import Subspace, losses

FULL = "all parameters"


@dataclass(frozen=True)
class Point:
    """One radius: `rho` in weight units, `ratio` = rho / ||W_S||, the loss's increase, and its share of the full
    space's.
    """

    rho: float
    ratio: float
    increase: float
    share: float | None = None


@dataclass(frozen=True)
class Curve:
    """The increase inside one subspace against rho and against rho / ||W_S||."""

    name: str
    neurons: int
    weight_norm: float
    gradient_share: float
    by_rho: list[Point]
    by_ratio: list[Point]


@dataclass(frozen=True)
class Sharpness:
    """All curves of one model on one set of pairs.

    Attributes:
        loss: L(theta).
        gradient_norm: Norm of the gradient over all parameters; a curve's `gradient_share` is its part of the square.
    """

    loss: float
    gradient_norm: float
    pairs: int
    curves: list[Curve]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PairLoss:
    """The mean DPO loss of a fixed set of pairs as a function of the weights alone.

    Args:
        model: The policy.
        data: The pairs.
        reference: The reference's log-probabilities of the same pairs.
        beta: Inverse temperature.
        batch_size: Pairs at once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: TokenizedPairs,
        reference: PairLogps,
        *,
        beta: float = 0.1,
        batch_size: int = 32,
    ) -> None:
        self.model, self._data, self._reference = model, data, reference
        self._beta, self._batch_size = beta, batch_size
        self._head = find_fused_head(model)
        self._device = next(model.parameters()).device

    def __len__(self) -> int:
        return len(self._data)

    def value(self) -> float:
        """L(theta), without gradients."""
        with torch.no_grad():
            return sum(part.item() for part in self._parts())

    def gradient(self) -> dict[str, Tensor]:
        """dL/dtheta of every parameter that takes part, by name; `.grad` stays untouched."""
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        total: dict[str, Tensor] = {}
        for part in self._parts():
            gradients = torch.autograd.grad(part, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient if name in total else gradient
        return total

    def _parts(self) -> Iterator[Tensor]:
        for start in range(0, len(self._data), self._batch_size):
            indices = list(range(start, min(start + self._batch_size, len(self._data))))
            policy = batch_logps(self.model, self._data.batch(indices, self._device), head=self._head)
            reference = self._reference[indices].to(self._device)
            per_pair = losses.dpo(policy.chosen, policy.rejected, reference.chosen, reference.rejected, beta=self._beta)
            yield per_pair.sum() / len(self._data)


def measure(
    loss: PairLoss,
    subspaces: Mapping[str, Subspace],
    *,
    rhos: Sequence[float] = (),
    ratios: Sequence[float] = (),
    progress: bool = True,
) -> Sharpness:
    """Measures every subspace, and all parameters beside them, at every radius.  The weights end as they were, bit for
    bit.

    Args:
        loss: The loss and the model.
        subspaces: Name to subspace; the name `FULL` is taken.
        rhos: Radii in weight units.
        ratios: Radii as multiples of ||W_S||.

    Raises:
        UserError: No radius, or one that is not above 0.
        SubspaceError: A subspace that does not fit the model.
    """
    if not rhos and not ratios:
        raise UserError("no radius to measure at; give some rho or some rho/||W_S||")
    for radius in (*rhos, *ratios):
        if not (math.isfinite(radius) and radius > 0):
            raise UserError(f"a radius is {radius}, but a finite value above 0 is expected")
    if FULL in subspaces:
        raise UserError(f"a subspace is named {FULL!r}, which the full space is called; choose another name")
    spaces = {FULL: Subspace.full(loss.model), **subspaces}
    for space in spaces.values():
        space.validate(loss.model)
    with (
        evaluating(loss.model),
        tqdm(
            total=len(spaces) * (len(rhos) + len(ratios)), desc="sharpness", unit="radius", disable=not progress
        ) as bar,
    ):
        base, gradient = loss.value(), loss.gradient()
        norm = _norm(gradient.values())
        full: dict[float, float] = {}
        curves = []
        for name, space in spaces.items():
            curve = _measure(loss, name, space, gradient, norm, base, rhos, ratios, full, bar.update)
            full = full or {point.rho: point.increase for point in curve.by_rho}
            curves.append(curve)
    return Sharpness(base, norm, len(loss), curves)


def loss_increase(loss: PairLoss, subspace: Subspace, rho: float) -> float:
    """increase(S, rho) alone; see the module."""
    with evaluating(loss.model):
        slices = _slices(loss.model, subspace, loss.gradient())
        base = loss.value()
        with _moved(slices, rho):
            return loss.value() - base


@dataclass(frozen=True)
class _Slice:
    weight: Tensor
    axis: int
    index: Tensor
    direction: Tensor

    def read(self) -> Tensor:
        return _select(self.weight, self.axis, self.index)

    def write(self, values: Tensor) -> None:
        if self.weight.dim() == 0:
            self.weight.copy_(values)
        else:
            self.weight.index_copy_(self.axis, self.index, values)


def _measure(
    loss: PairLoss,
    name: str,
    space: Subspace,
    gradient: Mapping[str, Tensor],
    norm: float,
    base: float,
    rhos: Sequence[float],
    ratios: Sequence[float],
    full: Mapping[float, float],
    tick: Callable[[], object],
) -> Curve:
    slices = _slices(loss.model, space, gradient)
    weight_norm = _norm(piece.read() for piece in slices)
    own = _norm(piece.direction for piece in slices)

    def point(rho: float) -> Point:
        with _moved(slices, rho):
            increase = loss.value() - base
        tick()
        worst = full.get(rho, increase if name == FULL else 0.0)
        return Point(rho, rho / weight_norm if weight_norm else math.nan, increase, increase / worst if worst else None)

    share = (own / norm) ** 2 if norm else math.nan
    by_rho, by_ratio = [point(rho) for rho in rhos], [point(ratio * weight_norm) for ratio in ratios]
    return Curve(name, space.count, weight_norm, share, by_rho, by_ratio)


def _slices(model: torch.nn.Module, subspace: Subspace, gradient: Mapping[str, Tensor]) -> list[_Slice]:
    by_identity = {id(parameter): gradient.get(name) for name, parameter in model.named_parameters()}
    slices = []
    for name, parameter in subspace.resolve(model).items():
        index = subspace[name].to(parameter.device)
        found = by_identity[id(parameter)]
        direction = _select(torch.zeros_like(parameter) if found is None else found, subspace.axis(name), index)
        slices.append(_Slice(parameter.data, subspace.axis(name), index, direction))
    return slices


@contextmanager
def _moved(slices: Sequence[_Slice], rho: float) -> Iterator[None]:
    norm = _norm(piece.direction for piece in slices)
    kept = [piece.read() for piece in slices]
    try:
        if norm > 0:
            for piece, values in zip(slices, kept, strict=True):
                piece.write((values + piece.direction * (rho / norm)).to(values.dtype))
        yield
    finally:
        for piece, values in zip(slices, kept, strict=True):
            piece.write(values)


def _select(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.dim() == 0 else tensor.detach().index_select(axis, index)


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
