"""Binds a subspace to a model: finds each selected weight's parameter, layers and layout, and checks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import SubspaceError, UnsupportedLayout
from ..interop.discovery import Layouts
from ..interop.names import module_aliases, owners
from ..interop.peft import reading_base_weights
from ..interop.quantised import acting_shape, is_quantised
from ..interop.sharding import Block, Layout
from ..interop.torch_private import storage_place
from ..subspace import Subspace
from .taps import stores_features_first
from .targets import Target


@dataclass(frozen=True)
class Candidate:
    """A selected weight before it is bound.

    Args:
        names: what the subspace calls it; several where a tied weight is named twice.
        axes: the neuron axis that each name has in the subspace.
        modules: the layers that hold it, and under which attribute.
        adapter: the adapter that reads it beside calling its layer, if any.
        delta: it must be perturbed without being written.
        one_use: it is perturbed in `modules` only, whichever other layers hold it.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...]
    parameter: nn.Parameter
    modules: list[tuple[nn.Module, str]]
    layout: Layout
    adapter: str | None
    delta: bool
    one_use: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def quantised(self) -> bool:
        return is_quantised(self.parameter)

    @property
    def linear(self) -> bool:
        """Whether every layer that holds it is a linear one, and computes with it alone."""
        return all(
            attribute == "weight" and stores_features_first(module, quantised=self.quantised) is not None
            for module, attribute in self.modules
        )


def why_not_one_axis(weight: Candidate) -> str | None:
    if len(set(weight.axes)) == 1:
        return None
    return f"{' and '.join(map(repr, weight.names))} are one tied weight, selected on different axes"


def why_not_strides(weight: Candidate) -> str | None:
    parameter = weight.parameter
    if parameter.dim() <= 2 or weight.quantised or parameter.is_contiguous():
        return None
    return f"{weight.name!r} has strides {list(parameter.stride())}: more than two axes must be contiguous"


def why_not_memory(weight: Candidate) -> str | None:
    if not weight.parameter.is_meta:
        return None
    return f"{weight.name!r} is on the meta device: make the optimizer once the weights have memory"


def why_not_unwritten(weight: Candidate) -> str | None:
    if not any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None for m, _ in weight.modules):
        return None
    return f"{weight.name!r} is written to in every forward pass (max_norm): it cannot be perturbed"


def why_not_gathered(weight: Candidate) -> str | None:
    if not weight.layout.gathered or weight.linear:
        return None
    return (
        f"{weight.name!r} is sharded and no nn.Linear's or Conv1D's alone: only linear layers' weights can be both "
        "sharded and perturbed"
    )


def why_not_delta(weight: Candidate) -> str | None:
    if not weight.delta or weight.linear:
        return None
    return f"{weight.name!r} is no nn.Linear's or Conv1D's alone: perturbation='delta' cannot move it; use 'in_place'"


def why_not_adapted(weight: Candidate) -> str | None:
    if weight.adapter is None or weight.parameter.requires_grad:
        return None
    return (
        f"{weight.name!r} is frozen, and its adapter ({weight.adapter}) computes with it beside its layer's calls, "
        "where no gradient of it is found: select other weights, or use LoRA, DoRA without dropout, VeRA, IA3…"
    )


#: What every selected weight must meet. Each returns why a weight does not, or `None`.
DEMANDS: tuple[Callable[[Candidate], str | None], ...] = (
    why_not_one_axis,
    why_not_strides,
    why_not_memory,
    why_not_unwritten,
    why_not_gathered,
    why_not_delta,
    why_not_adapted,
)


def bind(model: nn.Module, subspace: Subspace, *, delta: bool, sync: bool = True) -> list[Target]:
    """The targets of a subspace in a model, a tied weight once.

    Args:
        delta: every weight must be perturbed without being written, so each of its layers must be linear.
        sync: directions are averaged over data-parallel ranks.

    Raises:
        SubspaceError: the subspace does not fit the model, or a weight does not meet :data:`DEMANDS`.
    """
    targets = []
    written: dict[tuple[int, int], str] = {}
    for weight in _candidates(model, subspace, delta=delta, sync=sync):
        for why_not in DEMANDS:
            if (reason := why_not(weight)) is not None:
                raise SubspaceError(reason)
        if not (weight.delta or weight.quantised or weight.layout.gathered):
            _check_own_memory(weight, written)
        index = torch.unique(torch.cat([subspace[name] for name in weight.names]))
        layout, axis = weight.layout, weight.axes[0]
        partial = bool(layout.shape) and index.numel() < layout.shape[axis]
        tapped = weight.linear and (partial or weight.delta or layout.gathered or weight.quantised)
        targets.append(
            Target(
                weight.names,
                weight.parameter,
                index,
                axis,
                weight.modules,
                layout,
                tapped=tapped,
                one_use=weight.one_use,
            )
        )
    return targets


def _candidates(model: nn.Module, subspace: Subspace, *, delta: bool, sync: bool) -> list[Candidate]:
    try:
        layouts = Layouts(model, sync)
    except UnsupportedLayout as error:
        raise SubspaceError(f"the model cannot be perturbed: {error}") from error
    resolved = subspace.resolve(model, shape_of=layouts.shape)
    grouped: dict[int, list[str]] = {}
    for name, parameter in resolved.items():
        grouped.setdefault(id(parameter), []).append(name)
    owner_of, read_by = owners(model), reading_base_weights(model)
    layers = module_aliases(model) if any(subspace.own_layer(name) for name in resolved) else {}
    candidates = []
    for names in grouped.values():
        parameter = resolved[names[0]]
        modules = owner_of[id(parameter)]
        if any(subspace.own_layer(name) for name in names):
            own = [layers[name.rpartition(".")[0]] for name in names]
            if not all(subspace.own_layer(name) for name in names):
                raise SubspaceError(
                    f"{' and '.join(map(repr, names))} are one tied weight, one of them in its own layer only"
                )
            modules = [(module, attribute) for module, attribute in modules if any(module is one for one in own)]
        one_use = subspace.own_layer(names[0])
        try:
            layout = _acting(layouts.of(parameter), parameter, modules)
        except UnsupportedLayout as error:
            raise SubspaceError(f"{names[0]!r} cannot be perturbed: {error}") from error
        adapter = next((read_by[id(module)] for module, _ in modules if id(module) in read_by), None)
        axes = tuple(subspace.axis(name) for name in names)
        candidates.append(Candidate(tuple(names), axes, parameter, modules, layout, adapter, delta or one_use, one_use))
    return candidates


def _check_own_memory(weight: Candidate, written: dict[tuple[int, int], str]) -> None:
    """Two parameters in one memory would be perturbed twice there."""
    held = weight.layout.local(weight.parameter)
    if held.numel() and (other := written.setdefault(storage_place(held), weight.name)) != weight.name:
        raise SubspaceError(
            f"{weight.name!r} and {other!r} are two parameters in the same memory: tie the parameter itself, "
            "or use perturbation='delta'"
        )


def _acting(layout: Layout, parameter: Tensor, modules: list[tuple[nn.Module, str]]) -> Layout:
    """The layout of what a quantised weight acts as; others act as they lie."""
    if not is_quantised(parameter):
        return layout
    whole = Block.whole(acting_shape(parameter, modules) or ())
    return replace(layout, shape=whole.size, held=whole, computed=whole)
