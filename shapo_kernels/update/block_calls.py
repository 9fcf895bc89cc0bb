"""One call of a block, kept: what it was given, what it put out, and how a second call is told from the first.

Inputs are compared bit for bit. On a CPU a difference raises at once; on an accelerator it sets a flag there, which is
looked at before the update's step, when the pass that sets it has long begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..interop.sharding import local_part
from ..interop.torch_private import version
from .random_state import RandomState

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_OTHER_INPUT = (
    "pass 2 gave the blocks below the selected layers another input than pass 1 did: with reuse_prefix=True both "
    "passes need the same rows, mask and order of micro-batches, and replay_rng=True where dropout comes before them"
)
# transformers hands keywords of the loss on to every block; an ascent on a part of a batch has another number.
_OF_THE_LOSS = ("num_items_in_batch",)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Differences:
    """Whether any comparison since :meth:`begin` found a difference; asking waits for the comparisons alone."""

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None

    def begin(self) -> None:
        self._flag = self._sent = None

    @torch.no_grad()
    def compare(self, given: Tensor, kept: Tensor, *, exact: bool) -> None:
        """Compares bits, or with `exact=False` as rounding allows: rows may round otherwise among others.

        Raises:
            RuntimeError: at once on a CPU.
        """
        if exact or not kept.is_floating_point():
            given, kept = _bits(given), _bits(kept)
            different = torch.ne(given, kept)
        else:
            given, kept = local_part(given), local_part(kept)
            near = 64 * torch.finfo(kept.dtype).eps
            bound = near * kept.nan_to_num(0, 0, 0).abs().amax() if kept.numel() else 0.0
            different = ~((given == kept) | ((given - kept).abs() <= bound) | (given.isnan() & kept.isnan()))
        found = different.any()
        if found.device.type == "cpu":
            if bool(found):
                raise RuntimeError(_OTHER_INPUT)
            return
        self._flag, self._sent = found if self._flag is None else self._flag | found, None

    def send(self) -> None:
        """All comparisons are queued: copies the flag to the host without waiting."""
        if self._sent is None and self._flag is not None and self._flag.is_cuda:
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(self._flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._sent = (host, event)

    def check(self) -> None:
        """Raises RuntimeError where there was a difference, every time until the next :meth:`begin`."""
        if self._flag is None:
            return
        found: Tensor = self._flag
        if self._sent is not None:
            found, event = self._sent
            event.synchronize()
        if bool(found):
            raise RuntimeError(_OTHER_INPUT)


@dataclass(frozen=True)
class _Cache:
    """Stands for a cache of keys and values, which is not kept: later blocks' graphs hang on it."""

    length: int


@dataclass(frozen=True)
class _Input:
    """An output that is one of the inputs itself."""

    position: int


class Call:
    """A block's call in the ascent, kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: Of the block's modules, whether each was in training mode.
        self.training: list[bool] = []

    @classmethod
    def make(
        cls, name: str, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool
    ) -> tuple[Call, Any]:
        """Call `block`, and keep what is needed to put its output out again.

        Args:
            first: no other block that is kept runs before it in a forward pass.

        Returns:
            The call, and the block's own output.

        Raises:
            RuntimeError: two calls could not be compared, or the second not replaced.
        """
        call = cls(name)
        return call, call._make(block, args, kwargs, first)

    def _make(self, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], first: bool) -> Any:
        name = self.name
        given, self._given_spec = _flat((args, _own(kwargs)))
        for value in given:
            if not isinstance(value, (Tensor, *_PLAIN)) and not _is_cache(value):
                raise RuntimeError(
                    f"{name!r} was given a {type(value).__name__}, which cannot be compared between the passes: "
                    "leave reuse_prefix out"
                )
        caches = _caches(given)
        if first and any(cache.get_seq_length() for cache in caches):
            raise RuntimeError(
                f"{name!r} was given a cache that holds keys already: train with use_cache=False, "
                "or leave reuse_prefix out"
            )
        self._given = [_Cache(value.get_seq_length()) if _is_cache(value) else value for value in given]
        self._versions = [_version(value) for value in self._given]
        device = _device_of(given)
        self._mode = _mode(device)
        before = RandomState(device)
        # What the block puts into a cache is put into the descent's too.
        self._cached: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in caches]
        for cache, calls in zip(caches, self._cached, strict=True):
            cache.update = _listening(cache.update, calls)
        try:
            output = block(*args, **kwargs)
        finally:
            for cache in caches:
                del cache.update
        after = RandomState(device)
        self._random = None if after.same_as(before) else (before, after)
        put_out, self._out_spec = _flat(output)
        self._out = [
            next((_Input(i) for i, one in enumerate(given) if one is value and not isinstance(value, _PLAIN)), value)
            for value in put_out
        ]
        if odd := next((value for value in self._out if not isinstance(value, (Tensor, _Input, *_PLAIN))), None):
            raise RuntimeError(
                f"{name!r} put out a {type(odd).__name__}, which cannot be put out again: leave reuse_prefix out"
            )
        if any(_version(v) != then for v, then in zip(self._given, self._versions, strict=True)):
            raise RuntimeError(f"{name!r} writes to its own input: leave reuse_prefix out")
        self._out_versions = [_version(value) for value in self._out]
        return output

    def tensors_in(self) -> list[Tensor]:
        return [value for value in self._given if isinstance(value, Tensor)]

    def tensors_out(self) -> list[Tensor]:
        return [value for value in self._out if isinstance(value, Tensor)]

    @property
    def rows(self) -> int:
        """How many rows the block's first input has."""
        return next((value.shape[0] for value in self._given if isinstance(value, Tensor) and value.dim()), 0)

    # -- in the descent

    def again(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        handed: dict[int, tuple[Tensor, Tensor]],
        differences: Differences,
        rows: Tensor | None = None,
    ) -> Any:
        """What the block put out, for the same input.

        Args:
            handed: id of a tensor of this pass -> it, and the kept one that it is known to equal; added to.
            rows: the input is this part of the kept one, and the output is to be.

        Raises:
            RuntimeError: the input, or the mode it is computed in, is another.
        """
        given, spec = _flat((args, _own(kwargs)))
        if spec != self._given_spec or len(given) != len(self._given):
            raise RuntimeError(_OTHER_INPUT)
        device = _device_of(given)
        if _mode(device) != self._mode:
            raise RuntimeError(
                f"{self.name!r} runs under another autocast in pass 2 than in pass 1: with reuse_prefix=True both "
                "passes need the same"
            )
        for value, kept, then in zip(given, self._given, self._versions, strict=True):
            if isinstance(kept, _Cache):
                if not _is_cache(value) or value.get_seq_length() != kept.length:
                    raise RuntimeError(_OTHER_INPUT)
            elif isinstance(kept, Tensor):
                self._compare(value, kept, then, handed, differences, rows)
            elif type(value) is not type(kept) or value != kept:
                raise RuntimeError(_OTHER_INPUT)
        if any(_version(v) != then for v, then in zip(self._out, self._out_versions, strict=True)):
            raise RuntimeError(f"what {self.name!r} put out was written to in place: leave reuse_prefix out")
        for cache, calls in zip(_caches(given), self._cached, strict=True):
            for called_args, called_kwargs in calls:
                taken, taken_spec = _flat((called_args, called_kwargs))
                part = [self._part(value, rows) for value in taken]
                own_args, own_kwargs = tree_unflatten(part, taken_spec)
                cache.update(*own_args, **own_kwargs)
        if self._random is not None and rows is None and RandomState(device).same_as(self._random[0]):
            self._random[1].restore()
        return tree_unflatten([self._put_out(value, given, handed, rows) for value in self._out], self._out_spec)

    def _compare(
        self,
        value: Any,
        kept: Tensor,
        then: int | None,
        handed: dict[int, tuple[Tensor, Tensor]],
        differences: Differences,
        rows: Tensor | None,
    ) -> None:
        if _version(kept) != then:
            raise RuntimeError(
                f"an input of {self.name!r} was written to since pass 1, and cannot be compared any more: give each "
                "batch tensors of its own, or leave reuse_prefix out"
            )
        if not isinstance(value, Tensor) or value.dtype != kept.dtype or value.device != kept.device:
            raise RuntimeError(_OTHER_INPUT)
        if value is kept or handed.get(id(value), (None, None))[1] is kept:
            return
        expected = self._part(kept, rows)
        if value.shape != expected.shape:
            raise RuntimeError(_OTHER_INPUT)
        differences.compare(value, expected, exact=rows is None)
        handed[id(value)] = (value, kept)

    def _part(self, value: Any, rows: Tensor | None) -> Any:
        if rows is None or not isinstance(value, Tensor) or not value.dim() or value.shape[0] != self.rows:
            return value
        with torch.no_grad():
            return value.index_select(0, rows.to(value.device))

    def _put_out(
        self, value: Any, given: list[Any], handed: dict[int, tuple[Tensor, Tensor]], rows: Tensor | None
    ) -> Any:
        if isinstance(value, _Input):
            return given[value.position]
        if not isinstance(value, Tensor):
            return value
        # Another tensor than pass 1's: hooks that the model puts on what it is handed belong to one pass.
        new = value.view_as(value) if rows is None else self._part(value, rows).requires_grad_(value.requires_grad)
        handed[id(new)] = (new, value)
        return new


def detached(output: Any, *, requires_grad: bool = False) -> Any:
    """An output without its graph, in the same memory.

    Args:
        requires_grad: what required a gradient still does, as the end of a graph.
    """
    values, spec = _flat(output)
    ends = [
        v.detach().requires_grad_(requires_grad and v.requires_grad) if isinstance(v, Tensor) else v for v in values
    ]
    return tree_unflatten(ends, spec)


def _flat(values: Any) -> tuple[list[Any], Any]:
    return tree_flatten(values, is_leaf=_is_cache)


def _caches(values: Iterable[Any]) -> list[Any]:
    """The caches among values, each once."""
    return list({id(value): value for value in values if _is_cache(value)}.values())


def _is_cache(value: Any) -> bool:
    """A cache of keys and values, as transformers' are: blocks write to it by `update`."""
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))


def _listening(update: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def listen(*args: Any, **kwargs: Any) -> Any:
        put_out = update(*args, **kwargs)
        given = args[:2]
        # An empty cache puts out a copy of what it is given. Attention keeps the copy for its backward pass; keeping
        # that one, not its source, costs no memory.
        if isinstance(put_out, tuple) and [_kind(t) for t in put_out] == [_kind(t) for t in given]:
            args = (*put_out, *args[2:])
        calls.append((args, kwargs))
        return put_out

    return listen


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def _own(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _OF_THE_LOSS}


def _device_of(values: list[Any]) -> torch.device:
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


def _version(value: Any) -> int | None:
    return version(value) if isinstance(value, Tensor) else None


def _mode(device: torch.device) -> tuple[Any, ...]:
    enabled = torch.is_autocast_enabled(device.type)
    return enabled, torch.get_autocast_dtype(device.type) if enabled else None


def _bits(value: Tensor) -> Tensor:
    value = local_part(value)
    if not (value.is_floating_point() or value.is_complex()):
        return value
    if value.is_complex():
        value = torch.view_as_real(value)
    return value.view(_BITS[value.element_size()])
