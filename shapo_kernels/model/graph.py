"""Walks over autograd's graph by its edges, which tell one output of a node from another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor

#: A node and which of its outputs.
Edge: TypeAlias = "tuple[Any, int]"


def edges(tensors: Iterable[Tensor]) -> set[Edge]:
    """Where the graphs of tensors begin."""
    return {(tensor.grad_fn, tensor.output_nr) for tensor in tensors if tensor.grad_fn is not None}


def reached(start: Iterable[Edge], stop: Collection[Edge] = ()) -> Iterator[Any]:
    """Every node, once, that lies on a way from `start` on which no edge of `stop` comes before it."""
    seen: set[Any] = set()
    pending = [edge for edge in start if edge not in stop]
    while pending:
        node, _ = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(edge for edge in node.next_functions if edge not in stop)
