"""One selected weight of a model: its parameter, its compact form, and the taps on its layers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..interop.discovery import lasting_shape
from ..interop.quantised import compute_dtype_of_quantised, is_quantised
from ..interop.sharding import Layout
from ..interop.torch_private import is_dtensor
from ..ops.subspace_update import compute_dtype_of
from .descent_guard import DescentGuard
from .taps import Tap, stores_features_first
from .weight_tap import WeightTap

# A weight's compact memory is kept between updates where it is at most this share of the weight. Allocating it anew for
# 28 layers (1 % of 3072 x 2048 each) cost 1400 page faults an update: 3 to 14 ms on a virtual machine, where norm,
# perturb and restore take 27 ms.
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
        one_use: other layers that hold the weight, if any, are not to see it move.
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
        one_use: bool = False,
    ) -> None:
        self.names, self.parameter, self.modules, self.layout = names, parameter, modules, layout
        self.one_use = one_use
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
            kind = WeightTap if one_use and self._whole and not layout.computed_over else Tap
            self.taps = tuple(
                kind(
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
            getattr(module, attribute, None) is not self.parameter for module, attribute in self.modules
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
        """The parameter's `.grad` as such a tensor.

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

    def zeros(self) -> Tensor:
        """A direction of zero: what a rank without a gradient brings to a collective."""
        return torch.zeros(self.compact_shape, dtype=self.compute_dtype, device=self.parameter.device)

    def buffer(self, use: str, dtype: torch.dtype) -> Tensor:
        """Compact memory, its contents undefined: for one `use` the same in every update where neurons are few."""
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
        if is_dtensor(gradient):
            # Sums over a mesh's dimension may still be outstanding (Partial).
            placements = cast(Any, self.parameter).placements
            gradient = cast(Any, gradient).redistribute(placements=placements).to_local()
        return gradient.detach().reshape(self._matrix)

    def attach(self, guard: DescentGuard) -> None:
        if self.taps:
            self._handles = [
                tap.attach(module, guard) for tap, (module, _) in zip(self.taps, self.modules, strict=True)
            ]
        else:
            self._handles = [handle for module, _ in self.modules for handle in guard.attach(module)]
        if not (self.layout.gathered or self.quantised):
            for module, attribute in self.modules:
                guard.expect(module, attribute, self.parameter)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _matrix_shape(shape: tuple[int, ...], whole: bool) -> tuple[int, int]:
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) > 2:
        return shape[0], math.prod(shape[1:])
    # A whole vector is one row, copied as a run; single elements of one are rows of length 1.
    return (1, math.prod(shape)) if whole else (shape[0], 1)
