"""A subspace bound to a model: for every selected weight its parameter, its compact form and the taps on its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..distributed import total
from ..interop.names import owners
from ..interop.peft import reading_base_weights
from ..interop.quantised import acting_shape, compute_dtype_of_quantised, is_quantised
from ..interop.sharding import Block, Layout, Layouts, UnsupportedLayout, lasting_shape
from ..ops.subspace_update import compute_dtype_of
from ..subspace import Subspace, SubspaceError
from .descent_guard import Watch
from .taps import Tap, stores_features_first

# A weight's compact memory is kept between updates where it is at most this share of the weight. Made anew for 28
# layers (1 % of 3072 x 2048 each) it cost 1400 page faults an update: 3 to 14 ms on a virtual machine, beside 27 ms for
# norm, perturb and restore.
_KEPT_SHARE = 0.25


class Target:
    """One selected weight, as far as this rank computes with it.

    Args:
        names: what the subspace calls it; several where tied weights are named twice.
        parameter: the model's parameter.
        index: sorted neuron indices in the whole weight.
        axis: the neuron axis.
        modules: the layers that compute with it, and under which attribute they hold it.
        layout: how it lies over ranks.
        tapped: put taps on the layers (they must all be linear); otherwise the parameter itself is differentiated.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        parameter: nn.Parameter,
        index: Tensor,
        axis: int,
        modules: list[tuple[nn.Module, str]],
        layout: Layout,
        *,
        tapped: bool,
    ) -> None:
        self.names, self.parameter, self.modules, self.layout = names, parameter, modules, layout
        self._bound_shape = lasting_shape(parameter)
        self.quantised = is_quantised(parameter)
        shape = layout.shape
        self._whole = index.numel() == (shape[axis] if shape else 1)
        # A whole weight is one run of memory, whatever its dimensions: rows along its first axis.
        self.axis = axis if len(shape) == 2 and not self._whole else 0
        self._matrix = _matrix_shape(layout.computed.size, self._whole)
        self._held_matrix = _matrix_shape(layout.held.size, self._whole)
        if self._whole:
            self._index, self._held_index = torch.arange(self._matrix[0]), torch.arange(self._held_matrix[0])
        else:
            self._index, self._held_index = layout.computed.places(index, axis), layout.held.places(index, axis)
        self.taps: tuple[Tap, ...] = ()
        if tapped:
            tap_index = None if self._whole else self._index
            self.taps = tuple(
                Tap(
                    features_first=bool(stores_features_first(module, quantised=self.quantised)),
                    axis=axis,
                    index=tap_index,
                    sharded=bool(layout.computed_over),
                )
                for module, _ in modules
            )
        #: Whether a loss was seen to depend on the weight by other ways than its layers' calls.
        self.used_beside_calls = False
        self._compact_rows: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._buffers: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def index(self) -> Tensor:
        """The selected neurons of the part that is computed with, on the parameter's device."""
        if self._index.device != self.parameter.device:
            self._index = self._index.to(self.parameter.device)
        return self._index

    @property
    def replaced(self) -> bool:
        """Whether the layers hold another parameter than they did when it was bound, or another part of it."""
        return lasting_shape(self.parameter) != self._bound_shape or any(
            module._parameters.get(attribute) is not self.parameter for module, attribute in self.modules
        )

    @property
    def compact_shape(self) -> tuple[int, int]:
        rows, columns = self._matrix
        return (rows, self._index.numel()) if self.axis == 1 else (self._index.numel(), columns)

    @property
    def compact_rows(self) -> Tensor:
        """The rows of the compact form, as an index."""
        rows = self.compact_shape[0]
        if self._compact_rows is None or self._compact_rows.device != self.parameter.device:
            self._compact_rows = torch.arange(rows, device=self.parameter.device)
        return self._compact_rows

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of this weight's direction."""
        return compute_dtype_of(self.parameter.dtype)

    @property
    def forward_dtype(self) -> torch.dtype:
        """The dtype that the layers were last seen to compute in; the weight's own where they have not run."""
        seen = next((tap.compute_dtype for tap in self.taps if tap.compute_dtype is not None), None)
        if seen is not None:
            return seen
        return compute_dtype_of_quantised(self.parameter) if self.quantised else self.parameter.dtype

    @property
    def ran(self) -> bool:
        """Whether the layers have run since the ascent, or the update, began; taken for granted without taps."""
        return not self.taps or any(tap.ran for tap in self.taps)

    @property
    def unrecorded(self) -> bool:
        """Whether the layers may have run without a graph since the ascent began; unknown where there are no taps."""
        return not self.taps or any(tap.unrecorded for tap in self.taps)

    def weight(self) -> Tensor:
        """The weight as the 2-D tensor that the operators write to: a view, made anew as storage may have moved."""
        return self.layout.local(self.parameter).view(self._matrix)

    def held_neurons(self) -> tuple[Tensor, Tensor]:
        """What this rank holds of the weight as a matrix, and the selected neurons in it."""
        held = self.layout.local(self.parameter).view(self._held_matrix)
        if self._held_index.device != held.device:
            self._held_index = self._held_index.to(held.device)
        return held, self._held_index

    def gradient(self) -> Tensor | None:
        """The parameter's ``.grad`` as such a tensor.

        Raises:
            TypeError: it is sparse.
        """
        grad = self.parameter.grad
        return None if grad is None else self._as_matrix(grad)

    def compact(self, gradient: Tensor) -> Tensor:
        """The selected neurons of a gradient of the parameter, in the compute dtype.

        Raises:
            TypeError: it is sparse.
        """
        matrix = self._as_matrix(gradient)
        selected = matrix if self._whole else matrix.index_select(self.axis, self.index)
        return selected.to(self.compute_dtype)

    def leaf(self) -> Tensor:
        """A direction that is zero everywhere and takes no memory, to differentiate with respect to."""
        zero = torch.zeros((), dtype=self.compute_dtype, device=self.parameter.device)
        return zero.expand(self.compact_shape).requires_grad_()

    def buffer(self, use: str, dtype: torch.dtype) -> Tensor:
        """Compact memory, its contents undefined: for one ``use`` the same in every update where neurons are few."""
        buffer = self._buffers.get(use)
        if buffer is None or buffer.dtype != dtype or buffer.device != self.parameter.device:
            buffer = torch.empty(self.compact_shape, dtype=dtype, device=self.parameter.device)
            if buffer.numel() <= _KEPT_SHARE * self.parameter.numel():
                self._buffers[use] = buffer
        return buffer

    def _as_matrix(self, gradient: Tensor) -> Tensor:
        if gradient.layout != torch.strided:
            raise TypeError(
                f"the gradient of {self.name!r} is {gradient.layout}: ShaPO needs dense gradients (sparse=False)"
            )
        if isinstance(gradient, DTensor):
            # Sums over a mesh's dimension may still be outstanding (Partial).
            gradient = gradient.redistribute(placements=cast(DTensor, self.parameter).placements).to_local()
        return gradient.detach().reshape(self._matrix)

    def attach(self, watch: Watch) -> None:
        if self.taps:
            self._handles = [
                tap.attach(module, watch) for tap, (module, _) in zip(self.taps, self.modules, strict=True)
            ]
        else:
            self._handles = [handle for module, _ in self.modules for handle in watch.attach(module)]
        if not (self.layout.gathered or self.quantised):
            for module, attribute in self.modules:
                watch.expect(module, attribute, self.parameter)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def bind(model: nn.Module, subspace: Subspace, *, delta: bool, sync: bool = True) -> list[Target]:
    """The targets of a subspace in a model, a tied weight once.

    Args:
        delta: every weight must be perturbed without being written, so each of its layers must be linear.
        sync: directions are to be averaged over data-parallel ranks.

    Raises:
        SubspaceError: the subspace does not fit the model; a weight that the perturbation cannot be applied to.
    """
    try:
        layouts = Layouts(model, sync)
    except UnsupportedLayout as error:
        raise SubspaceError(f"the model cannot be perturbed: {error}") from error
    owner_of, read_by = owners(model), reading_base_weights(model)
    grouped: dict[int, list[str]] = {}
    resolved = subspace.resolve(model, shape_of=layouts.shape)
    for name, parameter in resolved.items():
        grouped.setdefault(id(parameter), []).append(name)
    targets = []
    places: dict[tuple[int, int], str] = {}
    for names in grouped.values():
        parameter = resolved[names[0]]
        try:
            layout = _acting(layouts.of(parameter), parameter, owner_of[id(parameter)])
        except UnsupportedLayout as error:
            raise SubspaceError(f"{names[0]!r} cannot be perturbed: {error}") from error
        axis = subspace.axis(names[0])
        if any(subspace.axis(name) != axis for name in names):
            raise SubspaceError(f"{' and '.join(map(repr, names))} are one tied weight, selected on different axes")
        quantised = is_quantised(parameter)
        if parameter.dim() > 2 and not quantised and not parameter.is_contiguous():
            raise SubspaceError(
                f"{names[0]!r} has strides {list(parameter.stride())}: more than two axes must be contiguous"
            )
        if parameter.is_meta:
            raise SubspaceError(f"{names[0]!r} is on the meta device: make the optimizer once the weights have memory")
        if not (delta or quantised or layout.gathered):
            held = layout.local(parameter)
            place = held.untyped_storage()._cdata, int(held.storage_offset())
            if held.numel() and (other := places.setdefault(place, names[0])) != names[0]:
                raise SubspaceError(
                    f"{names[0]!r} and {other!r} are two parameters in the same memory: tie the parameter itself, "
                    "or use perturbation='delta'"
                )
        index = torch.unique(torch.cat([subspace[name] for name in names]))
        modules = owner_of[id(parameter)]
        if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None for m, _ in modules):
            raise SubspaceError(f"{names[0]!r} is written to in every forward pass (max_norm): it cannot be perturbed")
        linear = all(
            attribute == "weight" and stores_features_first(module, quantised=quantised) is not None
            for module, attribute in modules
        )
        partial = bool(layout.shape) and index.numel() < layout.shape[axis]
        if layout.gathered and not linear:
            raise SubspaceError(
                f"{names[0]!r} is sharded and no nn.Linear's or Conv1D's alone: only linear layers' weights can be both"
            )
        if delta and not linear:
            raise SubspaceError(
                f"{names[0]!r} is no nn.Linear's or Conv1D's alone: perturbation='delta' cannot move it; use 'in_place'"
            )
        adapter = next((read_by[id(module)] for module, _ in modules if id(module) in read_by), None)
        if adapter is not None and not parameter.requires_grad:
            raise SubspaceError(
                f"{names[0]!r} is frozen, and its adapter ({adapter}) computes with it beside its layer's calls, where "
                "no gradient of it is found: select other weights, or use LoRA, DoRA without dropout, VeRA, IA3…"
            )
        tapped = linear and (partial or delta or layout.gathered or quantised)
        targets.append(Target(tuple(names), parameter, index, axis, modules, layout, tapped=tapped))
    return targets


def _acting(layout: Layout, parameter: Tensor, modules: list[tuple[nn.Module, str]]) -> Layout:
    """The layout of what a quantised weight acts as; others act as they lie."""
    if not is_quantised(parameter):
        return layout
    shape = acting_shape(parameter, modules) or ()
    whole = Block((0,) * len(shape), shape)
    return replace(layout, shape=shape, held=whole, computed=whole)


def complete(targets: Sequence[Target], found: Sequence[Target], values: Sequence[Tensor]) -> list[Tensor]:
    """A value for every target, zeros for those not found: what a rank brings to a collective."""
    held = dict(zip(found, values, strict=True))
    return [
        held[t] if t in held else torch.zeros(t.compact_shape, dtype=t.compute_dtype, device=t.parameter.device)
        for t in targets
    ]


def selected_weight_squared_norms(targets: Sequence[Target]) -> Tensor:
    """||W_S||^2 of each target, float64 ``[n]``: of the whole weight where ranks hold parts of it (a collective), NaN
    where it is quantised.
    """
    if any(target.quantised for target in targets):
        known = [target for target in targets if not target.quantised]
        norms = iter(selected_weight_squared_norms(known) if known else ())
        nan = torch.full((), torch.nan, dtype=torch.float64, device=targets[0].parameter.device)
        return torch.stack([nan if target.quantised else next(norms) for target in targets])
    parts = [target.held_neurons() for target in targets]
    squares = ops.selected_squared_norms(
        [rows for rows, _ in parts], [index for _, index in parts], [target.axis for target in targets]
    )
    return total(squares, [target.layout.held_over for target in targets])


def total_over_parts(sums: Tensor, targets: Sequence[Target]) -> Tensor:
    """Sums over what each rank computes with, a row for each target -> sums over whole weights (a collective)."""
    return total(sums, [target.layout.computed_over for target in targets])


def attach(targets: Iterable[Target], watch: Watch) -> None:
    for target in targets:
        target.attach(watch)


def detach(targets: Iterable[Target]) -> None:
    for target in targets:
        target.detach()


def _matrix_shape(shape: tuple[int, ...], whole: bool) -> tuple[int, int]:
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) > 2:
        return shape[0], math.prod(shape[1:])
    # A whole vector is one row, copied as a run; single elements of one are rows of length 1.
    return (1, math.prod(shape)) if whole else (shape[0], 1)
