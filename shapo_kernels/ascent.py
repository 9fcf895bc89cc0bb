"""The ascent (pass 1): where the direction of the perturbation comes from.

`SelectiveAscent` differentiates the loss with respect to the selected neurons only. It computes no weight gradients,
touches no `.grad`, and its backward pass ends at the lowest selected layer. `GradAscent` takes the direction from
the `.grad` of an ordinary backward pass, as the classic two-step SAM loop does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import ops
from .model import weight_uses
from .model.graph import edges, reached
from .model.targets import Target
from .ops.subspace_update import compute_dtype_of


class Ascent(Protocol):
    """`begin`, any number of backward passes, then `finish` for the direction, or `abort` after a failure."""

    @property
    def is_empty(self) -> bool:
        """Whether no selected weight has a gradient so far."""

    def begin(self) -> None: ...

    def ascend(self, loss: Tensor) -> None:
        """One backward pass that belongs to the ascent."""

    def leaves(self) -> list[Tensor]:
        """What a loss of the ascent is differentiated with respect to, each graph's end."""

    def collect(self, loss: Any = None) -> None:
        """Takes in what a closure's own `loss.backward()` has left behind.

        Args:
            loss: what the closure returned.
        """

    def finish(self) -> tuple[list[Target], list[Tensor]]:
        """The targets that have a gradient, and their compact gradients."""

    def abort(self) -> None: ...


class SelectiveAscent:
    """`torch.autograd.grad` of the loss with respect to the compact directions, summed over micro-batches.

    Args:
        parameters: all that a backward pass may leave a gradient in.
        strict: raise for a loss that no selected neuron takes part in. Before the first gradient that is a mistake;
            later it may be a batch that goes to other experts.
    """

    def __init__(self, targets: Sequence[Target], parameters: Sequence[nn.Parameter], *, strict: bool) -> None:
        self._targets, self._parameters, self._strict = targets, parameters, strict
        self._leaves: list[tuple[Target, Tensor]] = []
        self._sums: dict[Target, Tensor] = {}

    @property
    def is_empty(self) -> bool:
        return not self._sums

    def begin(self) -> None:
        # A weight without taps is differentiated itself; a frozen one then has no gradient, as under SAM.
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
        found = list(zip([target for target, _ in self._leaves], grads, strict=True))
        if any(grad is None and target.unrecorded for target, grad in found):
            _check_no_reentrant_checkpoints(loss)
        _check_layers_ran(loss, [target for target, grad in found if grad is None and not target.ran])
        if self._strict:
            _check_no_use_beside_calls(loss, self._targets)
            if all(grad is None for grad in grads):
                check_gradients_possible(self._targets)
        for target, grad in found:
            self._add(target, grad)

    def leaves(self) -> list[Tensor]:
        return [leaf for _, leaf in self._leaves]

    def collect(self, loss: Any = None) -> None:
        if self._strict:
            _check_no_use_beside_calls(loss, self._targets)
        for target, leaf in self._leaves:
            if leaf.grad is None and target.parameter.grad is not None and not target.ran:
                raise RuntimeError(other_use(target))
            self._add(target, leaf.grad)
        if self._strict and not self._sums and any(p.grad is not None for p in self._parameters):
            check_gradients_possible(self._targets)

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
    """Ordinary backward passes into `.grad`, which is put back as it was found."""

    def __init__(self, targets: Sequence[Target], parameters: Sequence[nn.Parameter], *, strict: bool) -> None:
        self._targets, self._parameters, self._strict = targets, parameters, strict
        self._earlier: list[tuple[nn.Parameter, Tensor | None]] = []

    @property
    def is_empty(self) -> bool:
        return all(target.parameter.grad is None for target in self._targets)

    def begin(self) -> None:
        if self._strict:
            weight_uses.note_calls(self._targets)
        self._earlier = [(parameter, parameter.grad) for parameter in self._parameters]
        clear_gradients(self._parameters)

    def ascend(self, loss: Tensor) -> None:
        check_differentiable(loss)
        loss.backward()
        self.collect(loss)

    def leaves(self) -> list[Tensor]:
        return [target.parameter for target in self._targets]

    def collect(self, loss: Any = None) -> None:
        if self._strict:
            for target in weight_uses.used_beside_calls(loss, self._targets):
                target.used_beside_calls = True
        if self._strict and self.is_empty and any(p.grad is not None for p in self._parameters):
            check_gradients_possible(self._targets)

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
    """The compact `.grad` of each target that has one."""
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


def check_differentiable(loss: Tensor) -> None:
    """Raises RuntimeError for a loss without a graph."""
    if not loss.requires_grad:
        raise RuntimeError("the ascent's loss does not require grad: compute it with gradients enabled, not detached")


def check_gradients_possible(targets: Sequence[Target]) -> None:
    """Called where no selected neuron has a gradient.

    Raises:
        RuntimeError: unless nothing is selected; says which mistake it is.
    """
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


def other_use(target: Target) -> str:
    """The message for a weight that the loss uses where its taps do not see it."""
    how = (
        "beside its layer's calls (as a penalty on the weights does): that takes"
        if target.ran
        else "without calling its layer inside the ascent: run the forward pass inside `with opt.ascent():`, or, for a "
        "layer that is never called (nn.MultiheadAttention's out_proj), use"
    )
    return f"the loss uses {target.name!r} {how} ascent='grad' with perturbation='in_place'"


def _check_no_use_beside_calls(loss: Any, targets: Sequence[Target]) -> None:
    if beside := weight_uses.used_beside_calls(loss, targets):
        raise RuntimeError(other_use(beside[0]))


def _check_layers_ran(loss: Tensor, idle: Sequence[Target]) -> None:
    """A weight that the loss depends on though its layer did not run is used where no tap sees it."""
    if not idle:
        return
    variables = {id(getattr(node, "variable", None)) for node in reached(edges([loss]))}
    for target in idle:
        if id(target.parameter) in variables:
            raise RuntimeError(other_use(target))


def _check_no_reentrant_checkpoints(loss: Tensor) -> None:
    """A reentrant checkpoint hides neurons from `autograd.grad`, and the others alone give a wrong direction."""
    if any(node.name() == "CheckpointFunctionBackward" for node in reached(edges([loss]))):
        raise RuntimeError(
            "the selective ascent cannot see through reentrant checkpointing: checkpoint with use_reentrant=False "
            '(transformers: gradient_checkpointing_enable({"use_reentrant": False})), or use ascent="grad"'
        )
