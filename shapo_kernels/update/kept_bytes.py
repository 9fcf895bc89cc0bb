"""How much memory a graph that waits for its backward pass holds, counted as it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..interop.sharding import local_part
from ..interop.torch_private import call_of, saved_tensors_are_hooked, storage_place, version


class KeptBytes:
    """Bytes of the tensors that autograd saves in some blocks, and of their inputs and outputs; weights not counted.

    Where a block is checkpointed its inputs and outputs are all there is. NaN where one is compiled.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count anew."""
        self._storages: dict[int, int] = {}
        self._compiled = False

    @property
    def total(self) -> float:
        return float("nan") if self._compiled else float(sum(self._storages.values()))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of these too, once."""
        for tensor in tensors:
            own = local_part(tensor)
            self._storages[storage_place(own)[0]] = own.untyped_storage().nbytes()

    @contextmanager
    def counting(self, block: nn.Module, call: Any) -> Iterator[None]:
        """Count what the graph of the block keeps that is made inside, by `call`."""
        if call != block._call_impl or any(
            (m is not block and call_of(m)[0]) or type(m).__name__ == "OptimizedModule" for m in block.modules()
        ):
            self._compiled = True
        if self._compiled or saved_tensors_are_hooked():
            yield
            return
        weights = {storage_place(local_part(p))[0] for p in block.parameters()}

        def keep(tensor: Tensor) -> tuple[Tensor, int]:
            if storage_place(local_part(tensor))[0] not in weights:
                self.add([tensor])
            return tensor, version(tensor)

        with saved_tensors_hooks(keep, _unchanged):
            yield


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    # autograd leaves this to whoever has hooks.
    tensor, then = kept
    if version(tensor) != then:
        raise RuntimeError("a tensor that the backward pass needs was written to in place since the forward pass")
    return tensor
