"""Raises where a forward or backward pass of the descent would not be that of the trained model at theta + eps.

Four mistakes would otherwise give wrong gradients without a word:

* backward runs after the weights are restored, so checkpointed layers are recomputed at theta;
* the reference pass of an adapter's policy runs on the perturbed base (same base, adapter off);
* gradients are taken while eps is put aside;
* a layer is called with other weights than its own (`torch.func.functional_call`), and misses what was written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..interop.peft import Adapters
from ..interop.torch_private import forward_hooks, in_backward, remove_forward_hook, share_memory

_LEFT = (
    "this was computed inside `with opt.perturbed():`, and the weights have been restored since: "
    "call backward() inside it too"
)
_SWITCHED = (
    "the model's adapters were switched or merged inside `with opt.perturbed():`: a reference pass there would run on "
    "the perturbed base; put it inside `with opt.unperturbed():`"
)
_MERGED = (
    "adapters were merged or unmerged inside `with opt.perturbed():`, and the selected neurons are back at what they "
    "were before: load the model's weights anew, and merge outside or use perturbation='delta'"
)
_OTHER_WEIGHT = (
    "a layer was called with another weight than the one that is perturbed in place (torch.func.functional_call?): "
    "use perturbation='delta', or call the model itself"
)
_ASIDE = (
    "only passes without gradients are allowed inside `with opt.unperturbed():`: put torch.no_grad() around this one"
)


class DescentGuard:
    """One for all layers that hold selected weights. Their hooks call :meth:`see` with every output.

    Args:
        model: looked through for PEFT's layers; `None` for a copied model's guard, which checks nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.is_copy = model is None
        self._adapters = Adapters(model)
        self._adapters_then: tuple[Any, ...] = ()
        self._attached: set[int] = set()
        self._weights: dict[int, list[tuple[str, Tensor]]] = {}
        #: Whether a descent is under way, and whether it writes to weights.
        self.active = self.writes = False
        self._descent: object | None = None
        self._aside = False
        # Forward passes of the last descent that no graph recorded and that were not computed again in it: a reentrant
        # checkpoint whose backward pass is still to come, or an evaluation.
        self._unrecorded = 0

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Guards a layer that no tap is on, once."""
        if id(module) in self._attached:
            return []
        self._attached.add(id(module))
        drop_copies(module)
        return [module.register_forward_hook(self)]

    def expect(self, module: nn.Module, attribute: str, weight: Tensor) -> None:
        """A layer computes with this weight, which may be written to, and with no other."""
        self._weights.setdefault(id(module), []).append((attribute, weight))

    def begin(self) -> None:
        """The descent begins."""
        self.active, self._descent = True, object()
        self._unrecorded, self._adapters_then = 0, self._adapters.state()

    def end(self) -> str | None:
        """The descent ends. Returns an error message, or `None`: weights are restored before anything is raised."""
        merged = self.writes and self._adapters.present and self._adapters.state()[-1] != self._adapters_then[-1]
        self.active, self.writes, self._descent, self._aside = False, False, None, False
        return _MERGED if merged else None

    def set_aside(self, aside: bool) -> None:
        """Whether eps is put aside for a while."""
        self._aside = aside

    def settle(self) -> None:
        """The update ends: backward passes from here on belong to others."""
        self._unrecorded = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.see(module, output)

    def see(self, module: nn.Module, output: Any) -> None:
        # What compiled code reads here is the same in every update, so it is compiled once.
        adapters = self._adapters
        if adapters.present and self.active and not self._aside and adapters.state() != self._adapters_then:
            raise RuntimeError(_SWITCHED)
        # A compiled model needs nothing of the rest: its backward pass has its weights among its saved tensors, whose
        # versions autograd checks, and it recomputes nothing by itself.
        if torch.compiler.is_compiling():
            return
        recomputing = in_backward()
        if not self.active:
            if recomputing and self._unrecorded > 0:
                raise RuntimeError(_LEFT)
            return
        if self._aside:
            if torch.is_grad_enabled():
                raise RuntimeError(_ASIDE)
            return
        if self.writes and any(
            not share_memory(getattr(module, attribute), weight)
            for attribute, weight in self._weights.get(id(module), ())
        ):
            raise RuntimeError(_OTHER_WEIGHT)
        if recomputing:
            self._unrecorded -= 1
        elif not torch.is_grad_enabled():
            self._unrecorded += 1
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(_SameDescent(self, self._descent))

    def is_in(self, descent: object) -> bool:
        return self._descent is descent

    def check_not_copied(self) -> None:
        """A model that is copied or pickled takes its hooks along, and they ask here.

        Raises:
            RuntimeError: its weights are perturbed in place, so the copy's would stay perturbed.
        """
        if self.writes:
            raise RuntimeError(
                "the model's weights are perturbed at this moment: copy or save it outside `with opt.perturbed():`, "
                "or call opt.restore() first"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> DescentGuard:
        self.check_not_copied()
        return DescentGuard(None)

    def __reduce__(self) -> tuple[Any, ...]:
        self.check_not_copied()
        return DescentGuard, (None,)


def drop_copies(module: nn.Module) -> None:
    """Removes the hooks that a copied model has taken along: nobody drives them."""
    for handle_id, hook in list(forward_hooks(module).items()):
        if getattr(hook, "is_copy", False):
            remove_forward_hook(module, handle_id)


class _SameDescent:
    """A gradient's hook: raises where the descent that its tensor was computed in has ended."""

    def __init__(self, guard: DescentGuard, descent: object) -> None:
        self._guard, self._descent = guard, descent

    def __call__(self, gradient: Tensor) -> None:
        if not self._guard.is_in(self._descent):
            raise RuntimeError(_LEFT)
