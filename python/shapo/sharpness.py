"""How much the loss rises when weights move a distance rho along its gradient, inside a subspace: Figure 1 of
arXiv:2602.07340.

For a subspace S and the gradient g of the same batch of pairs,

    increase(S, rho) = L(theta + rho * g_S / ||g_S||) - L(theta)
    share(S, rho)    = increase(S, rho) / increase(all, rho)

Radii are measured twice: as they are, and as multiples of ||W_S||, the norm of the weights that S selects, because a
radius says little without it: one per cent of the neurons at a given rho move far more, each, than all weights do.

The weights move as in training, by `ShaPOOptimizer`: eps is fp32, and where weights or computation have fewer bits it
is added in the forward pass. Written into bfloat16 weights, most of a small eps would be rounded away. What is no
linear layer's weight (embeddings, norms) is written, in bfloat16 and float16 with stochastic rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shapo.checked import checked
from shapo.errors import UserError
from shapo.models.fused_head import find_fused_head
from shapo.models.modes import evaluating
from shapo.scoring.logps import PairLogps, TokenizedPairs, batch_logps
from shapo_kernels import ShaPOOptimizer, Subspace, SubspaceError, losses
from shapo_kernels.interop.names import owners
from shapo_kernels.model.block_stack import share_above
from shapo_kernels.model.taps import stores_features_first

FULL = "all parameters"
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Point:
    """One radius.

    Attributes:
        rho: In weight units.
        ratio: rho / ||W_S||.
        increase: Of the loss.
        share: Of the full space's increase at the same rho.
        realised: Cosine between eps and what reached the forward pass; below 1 where eps was rounded.
    """

    rho: float
    ratio: float
    increase: float
    share: float | None = None
    realised: float = 1.0


@dataclass(frozen=True)
class Curve:
    """The increase inside one subspace against rho and against rho / ||W_S||.

    Attributes:
        gradient_share: ||g_S||^2 / ||g||^2.
        price: Of an update with `reuse_prefix=True`, in plain updates: (3 + 2 f) / 3, counted in forward passes, with f
            the share of the blocks from the lowest selected one on. `None`: no stack of blocks was found.
    """

    name: str
    neurons: int
    weight_norm: float
    gradient_share: float
    by_rho: list[Point]
    by_ratio: list[Point]
    price: float | None = None


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


@checked
class PairLoss:
    """The mean DPO loss of a fixed set of pairs as a function of the weights alone.

    Args:
        model: The policy.
        data: The pairs.
        reference: The reference's log-probabilities of the same pairs.
        beta: Inverse temperature.
        batch_size: Pairs at once.
        bf16: Compute under bfloat16 autocast.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: TokenizedPairs,
        reference: PairLogps,
        *,
        beta: float = 0.1,
        batch_size: int = 32,
        bf16: bool = False,
    ) -> None:
        self.model, self._data, self._reference = model, data, reference
        self._beta, self._batch_size, self.bf16 = beta, batch_size, bf16
        self._head = find_fused_head(model)
        self._device = next(model.parameters()).device

    def __len__(self) -> int:
        return len(self._data)

    def value(self) -> float:
        """L(theta), without gradients."""
        return self.per_item().mean().item()

    def per_item(self) -> Tensor:
        """The loss of every pair `[N]` fp64 on the CPU, without gradients."""
        with torch.no_grad():
            return torch.cat([part.double().cpu() for part in self._parts()])

    def parts(self) -> Iterator[Tensor]:
        """Losses of micro-batches, whose sum is L(theta), with gradients."""
        for part in self._parts():
            yield part.sum() / len(self)

    def gradient(self) -> dict[str, Tensor]:
        """dL/dtheta of every parameter that takes part, by name, summed in fp32 at least; `.grad` stays untouched."""
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        total: dict[str, Tensor] = {}
        for part in self.parts():
            gradients = torch.autograd.grad(part, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    total[name] = total[name].add_(wide) if name in total else wide
        return total

    def _parts(self) -> Iterator[Tensor]:
        for start in range(0, len(self._data), self._batch_size):
            indices = list(range(start, min(start + self._batch_size, len(self._data))))
            policy = batch_logps(self.model, self._data.batch(indices, self._device), bf16=self.bf16, head=self._head)
            reference = self._reference[indices].to(self._device)
            yield losses.dpo(policy.chosen, policy.rejected, reference.chosen, reference.rejected, beta=self._beta)


@checked
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
        SubspaceError: A subspace that does not fit the model, or is empty.
    """
    if not rhos and not ratios:
        raise UserError("no radius to measure at; give some rho or some rho/||W_S||")
    for radius in (*rhos, *ratios):
        if not (math.isfinite(radius) and radius > 0):
            raise UserError(f"a radius is {radius}, but a finite value above 0 is expected")
    if FULL in subspaces:
        raise UserError(f"a subspace is named {FULL!r}, which the full space is called; choose another name")
    spaces = {FULL: Subspace.full(loss.model), **subspaces}
    for name, space in spaces.items():
        space.validate(loss.model)
        if not space.count:
            raise SubspaceError(f"the subspace {name} is empty: there is nothing to move")
    total = len(spaces) * (len(rhos) + len(ratios))
    full: dict[float, float] = {}
    with (
        evaluating(loss.model),
        _movers(loss, list(spaces.values())) as (gradient, movers),
        tqdm(total=total, desc="sharpness", unit="radius", disable=not progress) as bar,
    ):
        base, norm = loss.value(), _norm(gradient.values())

        def point(mover: Mover, rho: float, ratio: float) -> Point:
            with mover.moved(rho):
                increase = loss.value() - base
            if not math.isfinite(increase):
                raise UserError(f"at rho {rho:g} the loss is not finite; give smaller radii")
            bar.update()
            worst = full.get(rho, increase if mover is movers[0] else 0.0)
            return Point(rho, ratio, increase, increase / worst if worst else None, mover.realised)

        curves = []
        for (name, space), mover in zip(spaces.items(), movers, strict=True):
            share = (mover.gradient_norm / norm) ** 2 if norm else math.nan
            by_rho = [point(mover, rho, rho / mover.weight_norm if mover.weight_norm else math.nan) for rho in rhos]
            by_ratio = [point(mover, ratio * mover.weight_norm, ratio) for ratio in ratios]
            price = _price(loss.model, space)
            curves.append(Curve(name, space.count, mover.weight_norm, share, by_rho, by_ratio, price))
            full = full or {one.rho: one.increase for one in by_rho}
    return Sharpness(base, norm, len(loss), curves)


def _price(model: torch.nn.Module, space: Subspace) -> float | None:
    try:
        return (3 + 2 * share_above(model, [model.get_submodule(name.rpartition(".")[0]) for name in space])) / 3
    except ValueError:
        return None


def loss_increase(loss: PairLoss, subspace: Subspace, rho: float) -> float:
    """increase(S, rho) alone; see the module."""
    with evaluating(loss.model), moving(loss, subspace) as mover:
        base = loss.value()
        with mover.moved(rho):
            return loss.value() - base


@contextmanager
def moving(loss: PairLoss, subspace: Subspace) -> Iterator[Mover]:
    """A mover of one subspace, for radii that are not known beforehand; hooks are on the model inside."""
    with _movers(loss, [subspace]) as (_, (mover,)):
        yield mover


class Mover:
    """One subspace of one model, moved along a gradient as an optimizer moves it.

    Args:
        loss: The loss and the model.
        subspace: What is moved.

    Attributes:
        weight_norm, gradient_norm: ||W_S|| and ||g_S||.
        realised: Of the last move; see `Point`.
    """

    def __init__(self, loss: PairLoss, subspace: Subspace) -> None:
        model = loss.model
        self._loss, self._model, self._subspace = loss, model, subspace
        self.weight_norm = _norm(_selected(value, subspace, name) for name, value in subspace.resolve(model).items())
        self.gradient_norm, self.realised = 0.0, 1.0
        self._gradient: Mapping[str, Tensor] = {}
        self._own: list[ShaPOOptimizer] = []
        self._optimizers = list(self._make(loss.bf16))

    def follow(self, gradient: Mapping[str, Tensor]) -> None:
        """Takes the gradient, by the names of the model's parameters."""
        self._gradient = gradient
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        found = {
            name: gradient.get(names[id(parameter)])
            for name, parameter in self._subspace.resolve(self._model).items()
            if not self._subspace.own_layer(name)
        }
        selected = _norm(_selected(g, self._subspace, name) for name, g in found.items() if g is not None)
        for optimizer in self._own:
            optimizer.rho = 1.0  # any but 0, with which there would be no ascent
            self._perturb(optimizer)
            optimizer.restore()
        self.gradient_norm = math.hypot(selected, *(optimizer.stats["grad_norm"] for optimizer in self._own))

    @contextmanager
    def moved(self, rho: float) -> Iterator[None]:
        """Inside, theta + rho g_S / ||g_S||; theta bit for bit on leaving."""
        if self.gradient_norm > 0 and not rho / self.gradient_norm * self.gradient_norm <= _FLOAT32_MAX:
            raise UserError(f"rho is {rho:g}, which no weight can hold; give smaller radii")
        try:
            if self.gradient_norm > 0:
                for optimizer in self._optimizers:
                    optimizer.rho = rho / self.gradient_norm
                for optimizer in self._optimizers:
                    self._perturb(optimizer)
                self.realised = _joint_cosine([optimizer.stats for optimizer in self._optimizers])
            yield
        finally:
            for optimizer in self._optimizers:
                optimizer.restore()

    def detach(self) -> None:
        for optimizer in self._optimizers:
            optimizer.detach()

    def _perturb(self, optimizer: ShaPOOptimizer) -> None:
        if optimizer not in self._own:
            with _gradients(self._model, self._gradient):
                optimizer.perturb()
            return
        # The gradient of a tied weight is that of all its layers; this one's alone comes of an ascent.
        with optimizer.ascent():
            for part in self._loss.parts():
                optimizer.ascend(part)
        optimizer.perturb()

    def _make(self, bf16: bool) -> Iterator[ShaPOOptimizer]:
        """One optimizer for the weights of linear layers, one for what can only be written, one for the weights of
        single layers.
        """
        holders, resolved = owners(self._model), self._subspace.resolve(self._model)
        own = {name for name in resolved if self._subspace.own_layer(name)}
        linear = {
            name
            for name, parameter in resolved.items()
            if name not in own
            and all(stores_features_first(module) is not None for module, _ in holders[id(parameter)])
        }
        for names, is_linear in ((own, True), (linear, True), (resolved.keys() - linear - own, False)):
            if not names:
                continue
            halves = any(resolved[name].dtype in (torch.bfloat16, torch.float16) for name in names)
            parts = {name: self._subspace[name] for name in sorted(names)}
            optimizer = ShaPOOptimizer(
                torch.optim.SGD([resolved[name] for name in parts], lr=0.0),
                self._model,
                Subspace(parts, {name: self._subspace.axis(name) for name in parts}, own_layer=own & names),
                rho=0.0,
                norm="none",
                ascent="selective" if names is own else "grad",
                perturbation="delta" if is_linear and (halves or bf16 or names is own) else "in_place",
                stochastic_rounding=halves and not is_linear,
            )
            if names is own:
                self._own.append(optimizer)
            yield optimizer


@contextmanager
def _movers(loss: PairLoss, spaces: Sequence[Subspace]) -> Iterator[tuple[dict[str, Tensor], list[Mover]]]:
    """The gradient, and a mover for each subspace; hooks are on the model inside."""
    movers: list[Mover] = []
    try:
        with warnings.catch_warnings():
            # What is rounded is told by `Point.realised`.
            warnings.filterwarnings("ignore", message="the perturbation is lost to rounding")
            movers.extend(Mover(loss, space) for space in spaces)
            gradient = loss.gradient()
            for mover in movers:
                mover.follow(gradient)
            yield gradient, movers
    finally:
        for mover in movers:
            mover.detach()


@contextmanager
def _gradients(model: torch.nn.Module, gradient: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, `.grad` is `gradient`, in its dtype; what it was before on leaving."""
    named = {name: parameter for name, parameter in model.named_parameters() if name in gradient}
    before = {name: parameter.grad for name, parameter in named.items()}
    try:
        for name, parameter in named.items():
            parameter.grad = None
            parameter.grad_dtype = gradient[name].dtype
            parameter.grad = gradient[name]
        yield
    finally:
        for name, parameter in named.items():
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
            parameter.grad = before[name]


def _joint_cosine(stats: Sequence[Mapping[str, float]]) -> float:
    """The cosine between eps and what reached the forward pass, over several optimizers' parts of it."""
    epsilon = sum(part["epsilon_norm"] ** 2 for part in stats)
    realised = sum(part["realised_norm"] ** 2 for part in stats)
    dot = sum(
        part["realised_cosine"] * part["epsilon_norm"] * part["realised_norm"]
        for part in stats
        if part["epsilon_norm"] > 0
    )
    return dot / math.sqrt(epsilon * realised) if epsilon > 0 and realised > 0 else 0.0


def _selected(tensor: Tensor, subspace: Subspace, name: str) -> Tensor:
    if tensor.dim() == 0:
        return tensor.detach()
    return tensor.detach().index_select(subspace.axis(name), subspace[name].to(tensor.device))


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
