"""The ascent (pass 1): where the perturbation's direction comes from.

``SelectiveAscent`` differentiates the loss with respect to the selected neurons only: no weight gradients are
computed, no ``.grad`` is touched, and the backward pass ends at the lowest selected layer. ``GradAscent`` takes the
direction from the ``.grad`` of an ordinary backward pass, as the classic two-step SAM loop does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import ops
from .model import weight_uses
from .model.targets import Target
from .ops.subspace_update import compute_dtype_of


class Ascent(Protocol):
    """``begin``, any number of backward passes, then ``finish`` for the direction, or ``abort`` where one failed."""

    def begin(self) -> None: ...

    def ascend(self, loss: Tensor) -> None:
        """One backward pass that belongs to the ascent."""

    def collect(self, loss: Any = None) -> None:
        """Take in what a ``loss.backward()`` by somebody else, a closure, has left behind.

        Args:
            loss: what the closure returned.
        """

    def finish(self) -> tuple[list[Target], list[Tensor]]:
        """The targets that have a gradient, and their compact gradients."""

    def abort(self) -> None: ...


class SelectiveAscent:
    """``torch.autograd.grad`` of the loss on the compact directions, added up over micro-batches.

    Args:
        parameters: all that a backward pass may leave a gradient in.
        strict: refuse a loss that no selected neuron takes part in: until one has, it is a mistake; later it may be a
            batch whose experts are others.
    """

    def __init__(self, targets: Sequence[Target], parameters: Sequence[nn.Parameter], *, strict: bool) -> None:
        self._targets, self._parameters, self._strict = targets, parameters, strict
        self._leaves: list[tuple[Target, Tensor]] = []
        self._sums: dict[Target, Tensor] = {}

    def begin(self) -> None:
        # A weight that no tap can stand for is differentiated itself; a frozen one then has no gradient, as under SAM.
        usable = [target for target in self._targets if target.taps or target.parameter.requires_grad]
        self._leaves = [(target, target.leaf() if target.taps else target.parameter) for target in usable]
        self._sums = {}
        if self._strict:
            weight_uses.note_calls(self._targets)
        for target, leaf in self._leaves:
            for tap in target.taps:
                tap.observe(leaf)

    def ascend(self, loss: Tensor) -> None:
        check_differentiable(loss)
        leaves = [leaf for _, leaf in self._leaves]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
        if any(grad is None and target.unrecorded for (target, _), grad in zip(self._leaves, grads, strict=True)):
            _refuse_reentrant_checkpoints(loss)
        missed = [t for (t, _), grad in zip(self._leaves, grads, strict=True) if grad is None and not t.ran]
        if missed:
            _refuse_other_uses(loss, missed)
        if self._strict and (beside := weight_uses.used_beside_calls(loss, self._targets)):
            refuse_other_use(beside[0])
        if self._strict and all(grad is None for grad in grads):
            refuse_absence(self._targets)
        for (target, _), grad in zip(self._leaves, grads, strict=True):
            self._add(target, grad)

    def collect(self, loss: Any = None) -> None:
        if self._strict and (beside := weight_uses.used_beside_calls(loss, self._targets)):
            refuse_other_use(beside[0])
        for target, leaf in self._leaves:
            if leaf.grad is None and target.parameter.grad is not None and not target.ran:
                refuse_other_use(target)
            self._add(target, leaf.grad)
        if self._strict and not self._sums and any(p.grad is not None for p in self._parameters):
            refuse_absence(self._targets)

    def finish(self) -> tuple[list[Target], list[Tensor]]:
        targets, values = list(self._sums), [value.contiguous() for value in self._sums.values()]
        self.abort()
        return targets, values

    def abort(self) -> None:
        for target, _ in self._leaves:
            for tap in target.taps:
                tap.rest()
        weight_uses.forget_calls(self._targets)
        self._leaves, self._sums = [], {}

    def _add(self, target: Target, grad: Tensor | None) -> None:
        if grad is None:
            return
        grad = grad.detach() if target.taps else target.compact(grad)
        # Not in place: autograd may hand the same tensor out for two inputs.
        self._sums[target] = self._sums[target] + grad if target in self._sums else grad


class GradAscent:
    """Ordinary backward passes into ``.grad``, which is left as it was found."""

    def __init__(self, targets: Sequence[Target], parameters: Sequence[nn.Parameter], *, strict: bool) -> None:
        self._targets, self._parameters, self._strict = targets, parameters, strict
        self._earlier: list[tuple[nn.Parameter, Tensor | None]] = []

    def begin(self) -> None:
        if self._strict:
            weight_uses.note_calls(self._targets)
        self._earlier = [(parameter, parameter.grad) for parameter in self._parameters]
        clear_gradients(self._parameters)

    def ascend(self, loss: Tensor) -> None:
        check_differentiable(loss)
        loss.backward()
        self.collect(loss)

    def collect(self, loss: Any = None) -> None:
        if self._strict:
            for target in weight_uses.used_beside_calls(loss, self._targets):
                target.used_beside_calls = True
        found = any(p.grad is not None for p in self._parameters)
        if self._strict and found and all(target.parameter.grad is None for target in self._targets):
            refuse_absence(self._targets)

    def finish(self) -> tuple[list[Target], list[Tensor]]:
        targets, values = gather_gradients(self._targets)
        self.abort()
        return targets, values

    def abort(self) -> None:
        for parameter, grad in self._earlier:
            parameter.grad = grad
        weight_uses.forget_calls(self._targets)
        self._earlier = []


def gather_gradients(targets: Sequence[Target]) -> tuple[list[Target], list[Tensor]]:
    """The compact ``.grad`` of each target that has one."""
    found = [(target, grad) for target in targets if (grad := target.gradient()) is not None]
    targets = [target for target, _ in found]
    values, _ = ops.gather(
        [grad for _, grad in found],
        [t.index for t in targets],
        [t.axis for t in targets],
        values=[t.buffer("direction", compute_dtype_of(grad.dtype)) for t, grad in found],
    )
    return targets, values


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def refuse_absence(targets: Sequence[Target]) -> None:
    """Nothing of the loss depends on a selected neuron."""
    if not targets:
        return
    if not any(target.parameter.requires_grad for target in targets):
        raise RuntimeError(
            "every selected weight is frozen, and no gradient of it is found this way: use ascent='selective' by "
            "`with opt.ascent():` or a closure, which perturbs frozen linear layers"
        )
    raise RuntimeError(
        "the loss depends on no selected neuron: run its forward pass inside `with opt.ascent():`, "
        "through the model that the optimizer was given"
    )


def _refuse_other_uses(loss: Tensor, targets: Sequence[Target]) -> None:
    """A weight that the loss depends on though its layer did not run is used otherwise, by no tap's knowledge."""
    variables = {id(getattr(node, "variable", None)) for node in weight_uses.nodes(loss.grad_fn)}
    for target in targets:
        if id(target.parameter) in variables:
            refuse_other_use(target)


def refuse_other_use(target: Target) -> None:
    how = (
        "beside its layer's calls (as a penalty on the weights does): that takes"
        if target.ran
        else "without calling its layer inside the ascent: run the forward pass inside `with opt.ascent():`, or, for a "
        "layer that is never called (nn.MultiheadAttention's out_proj), use"
    )
    raise RuntimeError(f"the loss uses {target.name!r} {how} ascent='grad' with perturbation='in_place'")


def _refuse_reentrant_checkpoints(loss: Tensor) -> None:
    """Where a reentrant checkpoint hides a selected neuron from ``autograd.grad``, others may have their gradients, and
    the direction would be a wrong one.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in weight_uses.nodes(loss.grad_fn)):
        raise RuntimeError(
            "the selective ascent cannot see through reentrant checkpointing: checkpoint with use_reentrant=False "
            '(transformers: gradient_checkpointing_enable({"use_reentrant": False})), or use ascent="grad"'
        )


def check_differentiable(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise RuntimeError("the ascent's loss does not require grad: compute it with gradients enabled, not detached")
