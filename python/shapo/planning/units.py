"""Which of a model's weights an engine gathers together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from shapo.models.wrappers import unwrap
from shapo_kernels import Subspace


@dataclass(frozen=True)
class Unit:
    """Weights that an engine gathers together: a block, or an embedding, or what is left.

    Attributes:
        shapes: Of its weights. trained: of those that take a gradient.
        role: "block", "embedding", "tail" (the last norm and the head) or "rest".
    """

    role: str
    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]


def units_of(model: Any) -> tuple[Unit, ...]:
    """A model's weights as FSDP2 gathers them under Accelerate: the embedding, each block, the last norm with the head.

    A tied head is in the tail, which then comes first.
    """
    inner = unwrap(model, for_calls=True)
    blocks = blocks_of(inner)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    seen: set[int] = set()

    def unit(role: str, *modules: nn.Module | None) -> Unit:
        own = [p for module in modules if module is not None for p in module.parameters() if id(p) not in seen]
        unique = list({id(p): p for p in own}.values())
        seen.update(map(id, unique))
        trained = tuple(tuple(p.shape) for p in unique if p.requires_grad)
        return Unit(role, tuple(tuple(p.shape) for p in unique), trained)

    made = [unit("block", block) for block in blocks]
    norms = [module for module in inner.base_model.children() if "norm" in type(module).__name__.lower()]
    last_norm = norms[-1] if norms else None
    if tied:
        first, tail = unit("tail", last_norm, embedding, head), None
    else:
        first, tail = unit("embedding", embedding), unit("tail", last_norm, head)
    rest = unit("rest", inner)
    found = (first, *made, *(() if tail is None else (tail,)), *((rest,) if rest.shapes else ()))
    return tuple(found)


def blocks_of(inner: Any) -> list[nn.Module]:
    names = set(getattr(inner, "_no_split_modules", None) or ())
    return [module for module in inner.modules() if type(module).__name__ in names]


def lowest_block(model: Any, subspace: Subspace | None) -> int:
    """Number of the lowest block with a selected neuron; 0 without a subspace."""
    if subspace is None:
        return 0
    inner = unwrap(model, for_calls=True)
    held = [{id(p) for p in block.parameters()} for block in blocks_of(inner)]
    selected = {id(p) for name, p in inner.named_parameters() if name in subspace.names}
    return next((number for number, own in enumerate(held) if own & selected), 0)
