"""The perturbation: holds a model at theta + eps, and gives it back as it was.

`InPlace` writes the selected neurons and keeps their old bits. `Delta` writes nothing: the taps add the direction
in the forward pass. Both take compact gradients and one scale for each layer, and report how much of eps reaches the
forward pass in the dtype that it computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import ops
from .interop.torch_private import keep_versions, version
from .model.targets import Target
from .reference.rounding import mixed


class Perturbation(Protocol):
    def apply(self, targets: list[Target], values: list[Tensor], scale: Tensor) -> Tensor:
        """Moves to theta + scale * values.

        Returns:
            float64 `[n, 3]` as :func:`shapo_kernels.ops.perturb_` does, of what this rank computes with. The third
            column, ||W_S||^2, is only of use where the weights are written.
        """

    def set_aside(self) -> AbstractContextManager[None]:
        """Inside, theta again; on leaving, the very bits that were applied."""

    def remove(self) -> str | None:
        """Back to theta, bit for bit; does nothing where nothing is applied. Returns an error message, or `None`."""


class StochasticRounding:
    """Keys for the stochastic rounding of one optimizer's perturbations: each perturbation draws its own numbers.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.draws = 0

    def next_key(self) -> int:
        self.draws += 1
        return mixed(mixed(self._seed) ^ (self.draws - 1))


# The weights that any optimizer in this process has perturbed in place at this moment.
_WRITTEN: MutableMapping[Tensor, None] = WeakIdKeyDictionary()


class InPlace:
    """W[:, S] += eps, the old columns kept compact and written back.

    Args:
        rounding: rounds 16-bit weights; to nearest where there is none.
    """

    def __init__(self, rounding: StochasticRounding | None = None) -> None:
        self._rounding = rounding
        self._targets: list[Target] = []
        self._backups: list[Tensor] = []
        self._written = False
        self._mark: Tensor | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._guards: list[torch.utils.hooks.RemovableHandle] = []

    def apply(self, targets: list[Target], values: list[Tensor], scale: Tensor) -> Tensor:
        twice = next((target.name for target in targets if target.parameter in _WRITTEN), None)
        if twice is not None:
            # Which bits come back would depend on who restores first.
            raise RuntimeError(
                f"{twice!r} is perturbed in place by another optimizer at this moment: restore that one first, "
                "or use perturbation='delta'"
            )
        weights = [target.weight() for target in targets]
        backups = [target.buffer("backup", weight.dtype) for target, weight in zip(targets, weights, strict=True)]
        # An interrupt can arrive after the operator has written and before this method notes it. The mark then tells:
        # it is overwritten when the backups are filled, the last one last, and nothing is written before that.
        self._mark = next((b.view(-1)[0] for b in reversed(backups) if b.numel()), None)
        if self._mark is not None:
            self._mark.fill_(torch.nan)
        self._targets, self._backups, self._written = targets, backups, False
        _WRITTEN.update((target.parameter, None) for target in targets)
        for target in targets:
            for module, _ in target.modules:
                self._guards.append(module.register_state_dict_pre_hook(_check_no_state_dict))
        realised = ops.perturb_(
            weights,
            [target.index for target in targets],
            [target.axis for target in targets],
            values,
            scale,
            backups,
            compute_dtype=_lower_compute_dtype(targets),
            rounding_key=None if self._rounding is None else self._rounding.next_key(),
        )
        self._written = True
        _forget_autocast_copies()
        self._versions = [(weight, version(weight)) for weight in weights]
        return realised

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        weights = [target.weight() for target in self._targets]
        moved = [
            weight.index_select(target.axis, target.index)
            for weight, target in zip(weights, self._targets, strict=True)
        ]
        # The same bits come back, so what autograd has saved of these weights stays valid.
        with keep_versions(weights):
            self._write(self._backups)
        try:
            yield
        finally:
            with keep_versions(weights):
                self._write(moved)

    def remove(self) -> str | None:
        written = [version(weight) != then for weight, then in self._versions]
        overwritten = self._targets[written.index(True)].name if any(written) else None
        if self._targets and (self._written or (self._mark is not None and not bool(self._mark.isnan()))):
            try:
                self._write(self._backups)
            except KeyboardInterrupt:
                self._write(self._backups)  # writing the same bits twice does no harm; leaving them unwritten would
                raise
        for target in self._targets:
            _WRITTEN.pop(target.parameter, None)
        self._targets, self._backups, self._written, self._versions = [], [], False, []
        for guard in self._guards:
            guard.remove()
        self._guards = []
        if overwritten is None:
            return None
        return (
            f"{overwritten!r} was written to while it was perturbed in place, and its selected neurons are back at "
            "what they were before: step and load outside `with opt.perturbed():`, or use perturbation='delta'"
        )

    def _write(self, bits: list[Tensor]) -> None:
        targets, weights = self._targets, [target.weight() for target in self._targets]
        # The model may have gone to another dtype or device in the meantime, and its weights with it.
        bits = [old.to(weight) for old, weight in zip(bits, weights, strict=True)]
        ops.restore_(weights, [t.index for t in targets], [t.axis for t in targets], bits)
        _forget_autocast_copies()


def _forget_autocast_copies() -> None:
    """`torch.autocast` around both passes keeps its copies of weights, which a write makes stale."""
    torch.clear_autocast_cache()


class Delta:
    """y = W x + D x[..., S]: eps lives in the taps and the weight is never written."""

    def __init__(self) -> None:
        self._targets: list[Target] = []
        self._directions: list[Tensor] = []

    def apply(self, targets: list[Target], values: list[Tensor], scale: Tensor) -> Tensor:
        self._targets, self._directions = targets, _like(values, torch.zeros)
        sums = scale.new_empty(len(targets), 3)
        # eps is made by perturbing compact weights of zero in place: a few launches for all layers, and a scale of 0
        # writes nothing, whatever the gradient holds.
        for dtype in dict.fromkeys(target.forward_dtype for target in targets):
            among = [i for i, target in enumerate(targets) if target.forward_dtype == dtype]
            every = len(among) == len(targets)
            realised = ops.perturb_(
                [self._directions[i] for i in among],
                [targets[i].compact_rows for i in among],
                [0] * len(among),
                [values[i] for i in among],
                scale if every else torch.stack([scale[i] for i in among]),
                _like([values[i] for i in among], torch.empty),  # their old zeros, of no use
                compute_dtype=dtype,
            )
            for i, row in () if every else zip(among, realised, strict=True):
                sums[i] = row
            sums = realised if every else sums
        for target, eps in zip(targets, self._directions, strict=True):
            for tap in target.taps:
                tap.add(eps)
        return sums

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        self._rest()
        try:
            yield
        finally:
            for target, eps in zip(self._targets, self._directions, strict=True):
                for tap in target.taps:
                    tap.add(eps)

    def remove(self) -> str | None:
        self._rest()
        self._targets, self._directions = [], []
        return None

    def _rest(self) -> None:
        for target in self._targets:
            for tap in target.taps:
                tap.rest()


def _like(values: Sequence[Tensor], made: Callable[..., Tensor]) -> list[Tensor]:
    """Contiguous tensors in one piece of memory for each dtype; each begins on 64 elements."""
    places: list[int] = []
    ends: dict[torch.dtype, int] = {}
    for value in values:
        places.append(ends.get(value.dtype, 0))
        ends[value.dtype] = places[-1] + -(-value.numel() // 64) * 64
    pieces = {dtype: made(end, dtype=dtype, device=values[0].device) for dtype, end in ends.items()}
    return [
        pieces[value.dtype][place : place + value.numel()].view(value.shape)
        for value, place in zip(values, places, strict=True)
    ]


def suits_in_place(targets: Sequence[Target]) -> bool:
    """Whether there are weights to write to, and they and computation wide enough for eps: the rule of `auto`."""
    wide = (torch.float32, torch.float64)
    return not any_gathered(targets) and all(
        not target.quantised and target.parameter.dtype in wide and target.forward_dtype in wide for target in targets
    )


def any_gathered(targets: Sequence[Target]) -> bool:
    return any(target.layout.gathered for target in targets)


def suits_delta(targets: Sequence[Target]) -> bool:
    return all(target.taps for target in targets)


def _lower_compute_dtype(targets: Sequence[Target]) -> torch.dtype | None:
    """The one dtype that all layers compute in where it is not their weights' own (autocast), else `None`."""
    found = {target.forward_dtype for target in targets if target.taps}
    return found.pop() if len(found) == 1 else None


def _check_no_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        f"the weights of {prefix.rstrip('.') or type(module).__name__!r} are perturbed at this moment: "
        "take the state_dict outside `with opt.perturbed():`, or call opt.restore() first"
    )
