"""The language-modelling loss as a function of the weights, beside `sharpness.PairLoss`, and ascents of many steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from shapo.data.tokens import PairEncoder
from shapo.models.fused_head import find_fused_head
from shapo.models.modes import evaluating
from shapo.scoring.logps import response_logps
from shapo_kernels import Subspace


class Loss(Protocol):
    """What can be climbed: `sharpness.PairLoss` and `LanguageLoss`."""

    model: torch.nn.Module

    def per_item(self) -> Tensor: ...

    def gradient(self) -> dict[str, Tensor]: ...


class LanguageLoss:
    r"""The mean over answers of each answer's negative log-likelihood per token, given its prompt.

    Args:
        model: A causal language model.
        encoder: The template and truncation.
        texts: (prompt, response).
        batch_size: Texts at once.
    """

    def __init__(
        self, model: torch.nn.Module, encoder: PairEncoder, texts: Sequence[tuple[str, str]], *, batch_size: int = 16
    ) -> None:
        self.model, self._encoder, self._batch_size = model, encoder, batch_size
        self._rows = [encoder.encode(prompt, response) for prompt, response in texts]
        self._head = find_fused_head(model)

    def __len__(self) -> int:
        return len(self._rows)

    def per_item(self) -> Tensor:
        """The loss of every text `[N]` fp64 on the CPU, without gradients."""
        with torch.no_grad():
            return torch.cat([part.double().cpu() for part in self._parts()])

    def gradient(self) -> dict[str, Tensor]:
        """The mean loss's gradient by parameter name; `.grad` stays untouched."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        total: dict[str, Tensor] = {}
        for part in self._parts():
            found = torch.autograd.grad(part.sum() / len(self), list(named.values()), allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient if name in total else gradient
        return total

    def _parts(self) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        for start in range(0, len(self._rows), self._batch_size):
            batch = self._encoder.collate(self._rows[start : start + self._batch_size])
            batch = {name: value.to(device) for name, value in batch.items()}
            sums, counts = response_logps(self.model, batch, bf16=False, head=self._head)
            yield -sums / counts.clamp(min=1)


@contextmanager
def moved(
    model: torch.nn.Module, subspace: Subspace, direction: Mapping[str, Tensor], rho: float | None = None
) -> Iterator[float]:
    """The model at theta + rho d_S / ||d_S|| inside, bit for bit itself on leaving; yields the distance.

    Args:
        model: The model, in float32 or float64 and computed so: a small step would be lost to coarser weights.
        subspace: S; outside it `direction` is not looked at.
        direction: d by parameter name, whole tensors; any direction, not the loss's gradient alone.
        rho: The distance; None for ||d_S||, which moves by d_S as it is.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pieces = []
    for name, parameter in subspace.resolve(model).items():
        found = direction.get(names[id(parameter)])
        if found is not None:
            index = subspace[name].to(parameter.device)
            pieces.append((parameter.data, subspace.axis(name), index, found.index_select(subspace.axis(name), index)))
    norm = math.sqrt(sum(float(piece.double().square().sum()) for *_, piece in pieces))
    distance = norm if rho is None else rho
    kept = [weight.index_select(axis, index) for weight, axis, index, _ in pieces]
    try:
        if norm > 0:
            for (weight, axis, index, piece), values in zip(pieces, kept, strict=True):
                weight.index_copy_(axis, index, values + piece * (distance / norm))
        yield distance
    finally:
        for (weight, axis, index, _), values in zip(pieces, kept, strict=True):
            weight.index_copy_(axis, index, values)


def climb(loss: Loss, subspace: Subspace, rho: float, *, steps: int, first: Mapping[str, Tensor]) -> Tensor:
    r"""The loss of every item after `steps` ascent steps inside the ball of radius rho.

    .. math:: d_{k+1} = \Pi_\rho\big(d_k + 2 \tfrac{\rho}{K} \tfrac{g_S(\theta + d_k)}{\|g_S(\theta + d_k)\|}\big),
        \quad d_1 = \rho \tfrac{g_S(\theta)}{\|g_S(\theta)\|}

    so that one step is the usual perturbation and further ones start from it. The result is the worst mean over the
    steps taken: what an adversary would keep.

    Args:
        loss: The loss and the model, whose weights end as they were.
        subspace: S.
        rho: The radius.
        steps: K, at least 1.
        first: The gradient at theta.
    """
    with evaluating(loss.model):
        displacement = _scaled(loss.model, subspace, first, rho)
        with moved(loss.model, subspace, displacement):
            worst = loss.per_item()
        for _ in range(steps - 1):
            with moved(loss.model, subspace, displacement):
                gradient = loss.gradient()
            step = _scaled(loss.model, subspace, gradient, 2 * rho / steps)
            displacement = {name: value + step[name] for name, value in displacement.items()}
            displacement = _scaled(loss.model, subspace, displacement, rho, only_down=True)
            with moved(loss.model, subspace, displacement):
                found = loss.per_item()
            worst = found if found.mean() > worst.mean() else worst
    return worst


def _scaled(
    model: torch.nn.Module,
    subspace: Subspace,
    direction: Mapping[str, Tensor],
    length: float,
    *,
    only_down: bool = False,
) -> dict[str, Tensor]:
    """`direction` times what gives its part inside the subspace that length."""
    with moved(model, subspace, direction) as norm:
        pass
    factor = length / norm if norm > 0 else 0.0
    factor = min(factor, 1.0) if only_down else factor
    return {name: value * factor for name, value in direction.items()}
