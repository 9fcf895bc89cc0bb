"""The stack of blocks that a model runs one after the other, and which of them lie below every selected layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from ..interop.names import module_aliases

_NAME_IT = "name the stack, as in reuse_prefix='model.layers'"


def blocks_below(
    model: nn.Module, selected: Collection[nn.Module], stack: str | None = None
) -> list[tuple[str, nn.Module]]:
    """Name and module of each block that runs before the lowest block with a selected layer; none where that is the
    first, or where an embedding is selected.

    The stack is an `nn.ModuleList` or `nn.Sequential`: the outermost one that holds selected layers or, where all
    of them lie outside (an output projection), the only outermost list there is. Selected layers outside the stack are
    taken to lie above it.

    Args:
        model: wrapped or not.
        selected: the layers that hold selected weights.
        stack: name of the stack in the unwrapped model, where it cannot be found.

    Raises:
        ValueError: no stack is found, several are, or `stack` names none.
    """
    if any(isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) for layer in selected):
        return []
    ids = {id(layer) for layer in selected}
    name, found = _named(model, stack) if stack is not None else _search(model, ids)
    below = []
    for child, block in found.named_children():
        if _holds(block, ids):
            break
        below.append((f"{name}.{child}" if name else child, block))
    return below


def share_above(model: nn.Module, selected: Collection[nn.Module]) -> float:
    """Share of the stack's blocks from the lowest one with a selected layer on: 1 where nothing lies below, 0 where all
    selected layers lie above the stack.

    Raises:
        ValueError: no stack is found, or several are.
    """
    below = blocks_below(model, selected)
    if not below:
        return 1.0
    stack = model.get_submodule(below[0][0].rpartition(".")[0])
    return 1.0 - len(below) / sum(1 for _ in stack.children())


def _named(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    found = module_aliases(model).get(name)
    if found is None:
        raise ValueError(f"reuse_prefix is {name!r}: the model has no module of that name")
    if not any(True for _ in found.children()):
        raise ValueError(f"reuse_prefix is {name!r}, a {type(found).__name__} without blocks: {_NAME_IT}")
    return name, found


def _search(model: nn.Module, ids: set[int]) -> tuple[str, nn.Module]:
    stacks = list(_outermost(model, "", ids))
    if not stacks:
        stacks = list(_outermost(model, "", None))
    if not stacks:
        raise ValueError(f"reuse_prefix=True finds no stack of blocks (nn.ModuleList) in the model: {_NAME_IT}")
    if len(stacks) > 1:
        names = " and ".join(repr(name) for name, _ in stacks[:3])
        raise ValueError(f"reuse_prefix=True finds several stacks of blocks, {names}: {_NAME_IT}")
    return stacks[0]


def _outermost(module: nn.Module, name: str, ids: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
    """Lists in `module`, none inside another, that hold one of `ids` (any list of two or more where that is None).

    A Sequential whose first part holds all of them, a model and its head, is looked into.
    """
    children = list(module.named_children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > (1 if ids is None else 0):
        holding = [child for _, child in children if ids is None or _holds(child, ids)]
        looked_into = isinstance(module, nn.Sequential) and (not holding or holding == [children[0][1]])
        if holding and not looked_into:
            yield name, module
            return
    for child, inner in children:
        yield from _outermost(inner, f"{name}.{child}" if name else child, ids)


def _holds(block: nn.Module, ids: set[int]) -> bool:
    return any(id(module) in ids for module in block.modules())
