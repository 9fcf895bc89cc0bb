"""Which weights a loss uses beside their layers' calls, read from its graph.

The graph is walked in Python, so this is done in the first ascent only, or before an error is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .graph import edges, reached
from .targets import Target


def note_calls(targets: Sequence[Target]) -> None:
    """Taps start to note their calls for :func:`used_beside_calls`, which keeps the calls' graphs alive."""
    for target in targets:
        for tap in target.taps:
            tap.calls = None if target.layout.held_over or target.one_use else []


def forget_calls(targets: Sequence[Target]) -> None:
    for tap in (tap for target in targets for tap in target.taps):
        tap.calls = None


def used_beside_calls(loss: Any, targets: Sequence[Target]) -> list[Target]:
    """Weights that the loss depends on other than through their layers' calls, which is all that taps see: a penalty on
    the weights, another layer that reads them.

    Compiled or transformed code and weights in parts over ranks are not looked into. The calls that the loss came from
    are forgotten, or every micro-batch's activations would stay until the last one's.
    """
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return []
    calls = {target: [call for tap in target.taps for call in tap.calls or ()] for target in targets}
    watched = {id(t.parameter): t for t, made in calls.items() if made and None not in made}
    if not watched:
        return []
    inside = {
        node
        for t in watched.values()
        for put_out, taken in filter(None, calls[t])
        for node in reached([(put_out, 0)], [taken])
    }
    found = {}
    walked = list(reached(edges([loss])))
    for node in walked:
        if node in inside or node.name().startswith("CompiledFunction"):
            continue
        for next_node, _ in node.next_functions:
            target = watched.get(id(getattr(next_node, "variable", None)))
            # A gradient of gradients leads there too: through a Conv1D's weight transposed, through a Linear's own
            # transposition.
            if target is not None and not (node.name() == "TBackward0" and target.taps[0].features_first):
                found[target.name] = target
    passed = set(walked)
    for tap in (tap for target in watched.values() for tap in target.taps):
        tap.calls = [call for call in tap.calls or () if call is not None and call[0] not in passed]
    return list(found.values())
