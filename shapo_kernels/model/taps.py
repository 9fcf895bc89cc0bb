"""Taps: forward hooks on the layers whose neurons are selected.

In an ascent a tap lets the direction's gradient out. In a descent with `perturbation="delta"` it adds the direction.
Otherwise it notes the dtype that the layer computed in and passes the output on. It stays attached from the making of
the optimizer to `detach()`, so that a model compiled in between keeps it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..interop.quantised import is_linear_by_features
from ..interop.sharding import local_part
from ..interop.torch_private import (
    base_of,
    forward_hooks,
    global_forward_hooks,
    in_backward,
    in_functorch,
    is_dtensor,
)
from .descent_guard import DescentGuard, drop_copies


class Tap:
    """The hook on one layer.

    Args:
        features_first: the weight is stored `[in_features, out_features]` (`Conv1D`), not the other way round.
        axis: the weight's neuron axis.
        index: selected neurons of the part of the weight that this rank computes with, `None` for all of them.
        sharded: that part is not the whole weight (tensor parallelism): inputs and outputs are DTensors.

    Neurons on the input side of the layer (value vectors) contribute `x[..., S] D^T` to all outputs; neurons on the
    output side contribute `x D^T` to the outputs S.
    """

    def __init__(self, *, features_first: bool, axis: int, index: Tensor | None, sharded: bool = False) -> None:
        self.features_first = features_first
        self._sharded = sharded
        self._on_input_side = (axis == 0) == features_first
        self._axis = axis
        self._index = index
        self._direction: Tensor | None = None
        self._adding = False
        self._guard = DescentGuard(None)
        self._place: tuple[OrderedDict[int, Any], int] = OrderedDict(), 0
        self._checked_under: tuple[int, ...] = ()
        #: Whether the layer has run without a graph since the ascent began: for an evaluation, or to be run again.
        self.unrecorded = False
        #: For each call in the first ascent, the node that its graph ends with and the edge that it begins at; `None`
        #: where neither is known.
        self.calls: list[tuple[Any, Any] | None] | None = None
        #: Whether the layer has run at all since the ascent, or the update, began.
        self.ran = False
        self.compute_dtype: torch.dtype | None = None

    def attach(self, module: nn.Module, guard: DescentGuard) -> RemovableHandle:
        drop_copies(module)
        self._guard = guard
        # Before other hooks: those of tensor parallelism sum or gather the layer's output, FSDP's may cast it.
        handle = module.register_forward_hook(self, with_kwargs=True, prepend=True)
        self._place = forward_hooks(module), handle.id
        return handle

    is_copy = False

    def observe(self, leaf: Tensor) -> None:
        """From now on let the gradient of the compact `leaf` out; its values are never read."""
        self._direction, self._adding, self.unrecorded = leaf, False, False
        self._go_first()

    def add(self, direction: Tensor) -> None:
        """From now on compute as if the compact `direction` had been added to the weight."""
        self._direction, self._adding = direction, True
        self._go_first()

    def rest(self) -> None:
        """From now on pass outputs on as they are."""
        self._direction, self._adding = None, False

    def _go_first(self) -> None:
        """Before hooks that others have put first since, and that may change the output; taps add up in any order."""
        hooks, place = self._place
        before = itertools.takewhile(lambda hook: hook is not self, hooks.values())
        if place in hooks and not all(isinstance(hook, Tap) for hook in before):
            hooks.move_to_end(place, last=False)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # Written without a look at what it was: a compiled model would be compiled anew for the look.
        self.compute_dtype, self.ran = output.dtype, True
        input = args[0] if args else next(iter(kwargs.values()))
        # A checkpoint's recomputation, in a backward pass, is no call of the loss's; noted, its graph would stay.
        if not torch.compiler.is_compiling() and self.calls is not None and not in_backward():
            self.calls.append(None if _transformed() else (output.grad_fn, (input.grad_fn, input.output_nr)))
        if self._direction is not None:
            if not torch.is_grad_enabled():
                self.unrecorded = True
            if not torch.compiler.is_compiling() and self._checked_under != (present := global_forward_hooks()):
                if present:
                    _check_output_unchanged(module, args, kwargs, output)
                self._checked_under = present
            if is_dtensor(output):
                output = self._on_parts(output, input, self._direction)
            elif self._sharded:
                raise RuntimeError(
                    f"a {type(module).__name__} with a tensor-parallel weight took or gave a plain tensor, whose ranks "
                    "cannot be seen: use torch's parallelize_module, or ascent='grad' with perturbation='in_place'"
                )
            else:
                output = self._joined(output, input, self._direction, in_place=self._may_write(module, output))
        self._guard.see(module, output)
        return output

    def _may_write(self, module: nn.Module, output: Tensor) -> bool:
        """Whether nobody else has seen the output: `nn.Linear` saves none of its own, and this hook is the first.

        With a bias the output is a view: autograd copies the whole gradient of one that was written to.
        """
        if type(module) is not nn.Linear or "forward" in module.__dict__ or global_forward_hooks():
            return False
        return torch.compiler.is_compiling() or not output.requires_grad or base_of(output) is None

    def _joined(self, output: Tensor, input: Tensor, direction: Tensor, *, in_place: bool = False) -> Tensor:
        index = self._index
        if index is not None and index.device != output.device:
            index = self._index = index.to(output.device)
        # Rows of the matrix are what the layer puts out, columns what it takes in.
        matrix = direction.t() if self.features_first else direction
        if self._on_input_side and not _transformed():
            if self._adding:
                return ops.neuron_update(output, input, matrix, index, in_place=in_place)
            return ops.neuron_tap(output, input, matrix, index)
        if self._on_input_side:
            selected = input if index is None else input.index_select(-1, index)
            return output + nn.functional.linear(selected.to(output.dtype), matrix.to(output.dtype))
        change = nn.functional.linear(input.to(output.dtype), matrix.to(output.dtype))
        return output + change if index is None else output.index_add(-1, index, change)

    def _on_parts(self, output: Any, input: Any, direction: Tensor) -> Tensor:
        """Each rank adds its own neurons' part to its own part of the output; both are DTensors."""
        from torch.distributed.tensor import DTensor, Replicate

        if not is_dtensor(input):
            raise RuntimeError(f"the layer's output is a DTensor and its input a {type(input).__name__}: expected two")
        gradients = _input_gradient_placements(input.placements, output.placements, output.ndim - 1)
        # Every rank's part of a sum has the sum's gradient; torch 2.10 would by itself take that for a part too.
        whole = [Replicate() if placement.is_partial() else placement for placement in output.placements]
        own_output = output.to_local(grad_placements=whole)
        parts = self._joined(own_output, input.to_local(grad_placements=gradients), direction)
        return DTensor.from_local(
            parts,
            output.device_mesh,
            output.placements,
            run_check=False,
            shape=output.shape,
            stride=torch.empty(output.shape, device="meta").stride(),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        self._guard.check_not_copied()
        return _copied_tap(self.features_first, self._axis, self._index, self._sharded)

    def __reduce__(self) -> tuple[Any, ...]:
        self._guard.check_not_copied()
        return _copied_tap, (self.features_first, self._axis, self._index, self._sharded)


def _transformed() -> bool:
    """Whether the layer runs inside vmap or another transform of torch.func, which knows torch's own operators only."""
    return not torch.compiler.is_compiling() and in_functorch()


def _check_output_unchanged(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    """Global hooks run before a layer's own. Whether one changed the output is seen only by computing it again: once
    for each layer and set of hooks, up to rounding.
    """
    with torch.no_grad():
        own, given = (local_part(x) for x in (module.forward(*args, **kwargs), output))
        same = own.dtype == given.dtype and own.shape == given.shape
        near = 8 * torch.finfo(own.dtype).eps
        largest = own.nan_to_num(0, 0, 0).abs().max().item() if own.numel() else 0.0
        if not (same and torch.allclose(own, given, rtol=near, atol=near * largest, equal_nan=True)):
            raise RuntimeError(
                f"a global forward hook changed the output of a {type(module).__name__} whose neurons are selected: "
                "register it on the layer itself"
            )


def _copied_tap(features_first: bool, axis: int, index: Tensor | None, sharded: bool) -> Tap:
    tap = Tap(features_first=features_first, axis=axis, index=index, sharded=sharded)
    tap.is_copy = True
    return tap


def _input_gradient_placements(inputs: tuple[Any, ...], outputs: tuple[Any, ...], features: int) -> list[Any]:
    """How the gradient of a linear layer's input lies over ranks, given how its input and output do.

    The ranks hold the weight's rows (they share the input and put out parts of the features, as `ColwiseParallel`
    makes it), or its columns (parts of the features come in, parts of a sum go out, `RowwiseParallel`), or all of it.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    gradients: list[Any] = []
    for given, put_out in zip(inputs, outputs, strict=True):
        if given.is_replicate() and put_out.is_shard(features):
            gradients.append(Partial())
        elif given.is_shard(features) and put_out.is_partial():
            gradients.append(Shard(features))
        elif given.is_replicate() and put_out.is_replicate():
            gradients.append(Replicate())
        else:
            raise RuntimeError(
                f"a tensor-parallel layer took {inputs} and put out {outputs}: neurons are perturbed in layers sharded "
                "as RowwiseParallel and ColwiseParallel do it"
            )
    return gradients


def stores_features_first(module: nn.Module, *, quantised: bool = False) -> bool | None:
    """True for `[in, out]` weights (`Conv1D`), False for `[out, in]` (`nn.Linear`), None for other layers.

    A layer of quantised weights is a linear one where it says so by its features, whatever its class; one of others is
    none where it computes otherwise than `nn.Linear` does, with a normalised weight for instance.
    """
    if quantised and is_linear_by_features(module):
        return False
    if isinstance(module, nn.Linear):
        return False if type(module).forward is nn.Linear.forward else None
    # By name, not to import transformers; of any base, as fully_shard makes a class of its own.
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        return True
    return None
