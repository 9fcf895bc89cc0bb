"""Blocks below every selected layer, computed once: the descent takes them from the ascent's forward pass, graph and
all.

Nothing below the lowest selected layer moves, so both passes compute the same there. The ascent's backward pass ends
above it and frees none of its graph: what the uppermost of these blocks puts out is handed on without its graph. The
descent's backward pass then runs through that graph, into the gradients of the weights below.

With forward = 1 and backward = 2 units and f the share of the depth above, an exact update costs 3 + 2 f instead of 5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..interop import fsdp
from ..interop.capturing import foreign_hook, hidden_states_hooks
from ..interop.deepspeed import is_engine
from ..interop.torch_private import call_in_place_of, call_of, in_backward, in_functorch, version
from ..model.block_stack import blocks_below
from ..model.graph import edges, reached
from .block_calls import Call, Differences, detached
from .kept_bytes import KeptBytes

_NO_CALL = (
    "reuse_prefix=True saw no call of {!r} with gradients inside the ascent: run the model's forward pass there, not "
    "compiled as a whole (compile its blocks one by one)"
)
_OTHER_CALLS = (
    "pass 2 called the blocks below the selected layers {} than pass 1 did: with reuse_prefix=True both passes take "
    "the same micro-batches in the same order"
)

_CHANGED = (
    "{!r} has changed between the passes (weights, adapters, train or eval): with reuse_prefix=True nothing below the "
    "selected layers may"
)


class _Stop(BaseException):
    """Everything that is needed has been kept; the rest of this forward pass is not."""


class Prefix:
    """Records in the ascent, replays in the descent; each block's call is taken over in between, and only then.

    Args:
        stack: `True` finds the stack of blocks, a string names it; `False` makes everything here do nothing.
    """

    def __init__(self, stack: bool | str) -> None:
        self._wanted, self._name = stack is not False, stack if isinstance(stack, str) else None
        self._blocks: list[tuple[str, nn.Module]] = []
        self._taken_over: list[tuple[nn.Module, Any]] = []
        self._calls: deque[Call] = deque()
        self._partial: deque[Call] | None = None
        self._rows: Tensor | None = None
        self._stops = False
        self._handed: dict[int, tuple[Tensor, Tensor]] = {}
        self._differences = Differences()
        self._selective, self._looked, self._seen = True, False, 0
        self._state: dict[str, tuple[Any, ...]] = {}
        self._kept = KeptBytes()
        self._descending = self._fewer = False

    @property
    def active(self) -> bool:
        """Whether there is anything to reuse in the update that is under way."""
        return bool(self._blocks)

    def find(self, model: nn.Module, selected: Collection[nn.Module]) -> None:
        """Look for the blocks below the layers `selected`; asked as each ascent begins, and once before.

        Raises:
            ValueError: there is no stack, or an engine runs hooks that a replayed block would lack.
        """
        if not self._wanted:
            return
        if is_engine(model) or fsdp.is_version_1(model):
            raise ValueError(
                "reuse_prefix=True under DeepSpeed or FullyShardedDataParallel, whose hooks expect every block in "
                "every pass: use fully_shard or DistributedDataParallel"
            )
        self._blocks = blocks_below(model, selected, self._name)

    # -- the ascent

    def begin_ascent(self, model: nn.Module, selected: Collection[nn.Module], *, selective: bool) -> None:
        """Pass 1 begins: keep what the blocks compute from here on.

        Args:
            selective: its backward passes differentiate the selected neurons only.
        """
        self.abort()
        if not self._wanted:
            return
        self.find(model, selected)
        self._selective, self._seen = selective, 0
        self._state = {name: (_weights_of(block),) for name, block in self._blocks}
        self._take_over(self._record)

    def look_at(self, loss: Any, leaves: Collection[Tensor]) -> None:
        """Called with each loss of the ascent: before a selective backward pass, after an ordinary one.

        Args:
            leaves: what the ascent differentiates with respect to.

        Raises:
            RuntimeError: nothing was kept, a selected weight lies below, or the loss takes something else from there
                than what the blocks put out.
        """
        if not self._blocks:
            return
        if self._seen == 0:
            raise RuntimeError(_NO_CALL.format(self._blocks[0][0]))
        if self._looked or not isinstance(loss, Tensor) or not self._calls:
            return
        # Walked in Python, so in the first ascent only: what a model does with its blocks it does in every pass.
        calls = list(self._calls)
        put_out = edges(t for call in calls for t in call.tensors_out())
        inside = set(reached(put_out))
        variables = {id(getattr(node, "variable", None)) for node in inside}
        if any(id(leaf) in variables for leaf in leaves):
            raise RuntimeError(
                f"a selected weight is used below {self._blocks[-1][0]!r}, outside the stack of blocks: "
                "leave reuse_prefix out"
            )
        if self._selective:
            # Its backward pass frees nothing here, so the loss may depend on each block's output.
            inside = {n for c in calls for n in reached(edges(c.tensors_out()), edges(c.tensors_in()))}
        stop = put_out if self._selective else ()
        if any(node in inside and not hasattr(node, "variable") for node in reached(edges([loss]), stop)):
            raise RuntimeError(
                f"the loss depends on what the blocks up to {self._blocks[-1][0]!r} compute beside their last output "
                "(a router's loss, keys shared between layers, with ascent='grad' or a closure hidden states): "
                "leave reuse_prefix out"
            )

    def end_ascent(self) -> None:
        """Pass 1 has ended; what was kept waits for the descent."""
        self._looked = self._looked or bool(self._calls)
        for name, block in self._blocks:
            self._state[name] = (*self._state[name], _flags_of(block))
        self._give_back()

    @contextmanager
    def part(self, run: Callable[[], object], rows: Tensor) -> Iterator[None]:
        """Keep the blocks' outputs for what `run` gives the model; inside, the model is given some rows of it."""
        if not self._taken_over:
            yield
            return
        before = len(self._calls)
        self._stops = True
        try:
            run()
        except _Stop:
            pass
        finally:
            self._stops = False
        kept = list(self._calls)[before:]
        if not kept:
            raise RuntimeError(_NO_CALL.format(self._blocks[0][0]))
        self._partial, self._rows = deque(kept), rows
        self._handed = {}
        try:
            yield
        finally:
            self._partial = self._rows = None
            self._handed = {}

    def _record(self, number: int, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        block = self._blocks[number][1]
        self._seen += 1
        if self._partial is not None:
            part = self._next(self._partial, name, block).again(
                args, kwargs, self._handed, self._differences, self._rows
            )
            return detached(part, requires_grad=number == len(self._blocks) - 1 and not self._selective)
        if in_functorch():
            raise RuntimeError(f"{name!r} runs inside a torch.func transform: leave reuse_prefix out")
        if hook := foreign_hook(block, name):
            raise RuntimeError(f"{hook}, which a block that is taken from pass 1 would not run: leave reuse_prefix out")
        # Counted in the first ascent; a later one keeps as much for as large a batch.
        counted = self._kept.counting(block, call) if not self._looked else nullcontext()
        with counted:
            kept, output = Call.make(name, call, args, kwargs, first=number == 0)
        kept.training = _training_of(block)
        if not self._looked:
            self._kept.add([*kept.tensors_in(), *kept.tensors_out()])
        self._calls.append(kept)
        if number < len(self._blocks) - 1:
            return output
        if self._stops:
            raise _Stop
        # Where an ordinary backward pass ends here, reentrant checkpoints above must find something that asks for it.
        return detached(output, requires_grad=not self._selective)

    # -- the descent

    def begin_descent(self) -> None:
        """Pass 2 begins: replay.

        Raises:
            RuntimeError: the weights below, or how they are used, have changed since.
        """
        if not self._calls:
            return
        for name, block in self._blocks:
            if self._state[name] != (_weights_of(block), _flags_of(block)):
                self.abort()
                raise RuntimeError(_CHANGED.format(name))
        self._handed, self._descending = {}, True
        self._take_over(self._replay)

    def check_calls(self) -> None:
        """Asked where a descent's passes are done.

        Raises:
            RuntimeError: there were fewer calls than in the ascent.
        """
        if self._descending and self._calls:
            raise RuntimeError(_OTHER_CALLS.format("fewer times"))

    def end_descent(self) -> None:
        """Pass 2 has ended, by an exception too."""
        if not self._descending:
            return
        self._fewer, self._descending = bool(self._calls), False
        self._give_back()
        self._calls.clear()
        self._handed = {}
        self._differences.send()

    def check(self) -> None:
        """Asked before the step, which must not be taken where pass 2 was another than pass 1. Waits for the
        comparisons, which were the first thing that pass 2 computed.

        Raises:
            RuntimeError: its calls were fewer, or its inputs others.
        """
        if self._fewer:
            raise RuntimeError(_OTHER_CALLS.format("fewer times"))
        self._differences.check()

    def _replay(self, number: int, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if number == 0:
            self._handed = {}
        block = self._blocks[number][1]
        if hook := foreign_hook(block, name):
            raise RuntimeError(f"{hook}, which a block that is taken from pass 1 does not run: leave reuse_prefix out")
        output = self._next(self._calls, name, block).again(args, kwargs, self._handed, self._differences)
        if number == len(self._blocks) - 1:
            # Nothing that the backward pass is done with is kept beyond it.
            self._handed = {}
        if not self._calls:
            self._differences.send()
        for capture in hidden_states_hooks(block):
            capture(block, args, output)
        return output

    @staticmethod
    def _next(calls: deque[Call], name: str, block: nn.Module) -> Call:
        if not calls:
            raise RuntimeError(_OTHER_CALLS.format("more often"))
        if calls[0].name != name:
            raise RuntimeError(_OTHER_CALLS.format("in another order"))
        if calls[0].training != _training_of(block):
            raise RuntimeError(_CHANGED.format(name))
        return calls.popleft()

    # -- in between

    def abort(self) -> None:
        """Drops everything that is kept, in any state."""
        self._give_back()
        self._calls.clear()
        self._handed, self._state, self._partial = {}, {}, None
        self._descending = self._fewer = False
        self._differences.begin()

    def stats(self) -> dict[str, float]:
        """`prefix_blocks` that the descent takes from the ascent, and `prefix_bytes` kept for it between them."""
        return {"prefix_blocks": len(self._blocks), "prefix_bytes": self._kept.total} if self._wanted else {}

    def _take_over(self, act: Callable[..., Any]) -> None:
        for number, (name, block) in enumerate(self._blocks):
            own, call = call_of(block)
            self._taken_over.append((block, own))
            call_in_place_of(block, _taken_over(act, number, name, call))

    def _give_back(self) -> None:
        while self._taken_over:
            call_in_place_of(*self._taken_over.pop())


def _taken_over(act: Callable[..., Any], number: int, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def taken_over(*args: Any, **kwargs: Any) -> Any:
        # Passes without gradients are an evaluation's or a reference's; inside a backward pass a checkpoint computes
        # again what it has kept.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_backward():
            return call(*args, **kwargs)
        return act(number, name, call, args, kwargs)

    return taken_over


def _weights_of(block: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (name, id(p), version(p), p.requires_grad)
        for module in block.modules()
        for name, p in module._parameters.items()
        if p is not None
    ]


def _training_of(block: nn.Module) -> list[bool]:
    return [module.training for module in block.modules()]


def _flags_of(block: nn.Module) -> list[tuple[str, Any]]:
    """Switches of the block's modules: training, adapters that are active, disabled or merged…"""
    return [
        (name, list(value) if isinstance(value, (list, tuple)) else value)
        for module in block.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, (bool, str))
        or (isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value))
    ] + [
        (name, (id(buffer), version(buffer)))
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
