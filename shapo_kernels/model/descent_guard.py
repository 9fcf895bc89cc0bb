"""What is computed at theta + eps must be differentiated there, and by the model that is trained: the hook that sees to
it.

Four things would otherwise be wrong without a word. A backward pass after the descent's end recomputes checkpointed
layers at theta; eps belongs to neither the reference model of an adapter's policy, which is the same base with the
adapter off; gradients taken while eps is put aside are of no use to anybody; and a layer that is called with other
weights than its own (torch.func.functional_call) does not see what was written to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_LEFT = (
    "this was computed inside `with opt.perturbed():`, and the weights have been restored since: "
    "call backward() inside it too"
)
_ADAPTERS = (
    "the model's adapters were switched or merged inside `with opt.perturbed():`: a reference pass there is one of the "
    "perturbed base; put it inside `with opt.unperturbed():`"
)
_MERGED = (
    "adapters were merged or unmerged inside `with opt.perturbed():`, and the selected neurons are back at what they "
    "were before: load the model's weights anew, and merge outside or use perturbation='delta'"
)
_OTHER_WEIGHT = (
    "a layer was called with another weight than the one that is perturbed in place (torch.func.functional_call?): "
    "use perturbation='delta', or call the model itself"
)
_ASIDE = "inside `with opt.unperturbed():` are passes without gradients only: put torch.no_grad() around this one"


class Watch:
    """One for all layers that hold selected weights; their hooks call :meth:`see` with every output.

    ``lasts`` says whether a descent is under way.

    Args:
        model: looked through for PEFT's layers; ``None`` for a copy's, which watches nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.is_copy = model is None
        modules = () if model is None else model.modules()
        # All of them are switched together; by its property, not to import peft.
        self._adapter = next((m for m in modules if isinstance(_class_attribute(m), property)), None)
        self._attached: set[int] = set()
        self._weights: dict[int, list[tuple[str, Tensor]]] = {}
        self._adapters: Any = None
        self.lasts = False
        #: Whether weights are written to in the descent that is under way.
        self.writes = False
        self._block: object | None = None
        self._aside = False
        # Forward passes of the last descent that no graph recorded and that were not computed again in it: a reentrant
        # checkpoint whose backward pass is still to come, or an evaluation.
        self._unrecorded = 0

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Watch a layer that no tap is on, once."""
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
        self.lasts, self._block = True, object()
        self._unrecorded, self._adapters = 0, self._which_adapters()

    def end(self) -> None:
        """The descent ends."""
        self.lasts, self.writes, self._block, self._aside = False, False, None, False

    def set_aside(self, aside: bool) -> None:
        """Whether eps is put aside for a while."""
        self._aside = aside

    def settle(self) -> None:
        """The update ends: backward passes to come are those of others."""
        self._unrecorded = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.see(module, output)

    def see(self, module: nn.Module, output: Any) -> None:
        # Compiled too: what is read here is the same in every update, so that it is compiled once.
        if self._adapter is not None and self.lasts and not self._aside and self._which_adapters() != self._adapters:
            raise RuntimeError(_ADAPTERS)
        # A compiled model needs nothing of the rest: its backward pass has its weights among its saved tensors, whose
        # versions autograd checks, and it recomputes nothing by itself.
        if torch.compiler.is_compiling():
            return
        recomputing = torch._C._current_graph_task_id() != -1
        if not self.lasts:
            if recomputing and self._unrecorded > 0:
                raise RuntimeError(_LEFT)
            return
        if self._aside:
            if torch.is_grad_enabled():
                raise RuntimeError(_ASIDE)
            return
        if self.writes and any(
            not _same_memory(getattr(module, attribute), weight)
            for attribute, weight in self._weights.get(id(module), ())
        ):
            raise RuntimeError(_OTHER_WEIGHT)
        if recomputing:
            self._unrecorded -= 1
        elif not torch.is_grad_enabled():
            self._unrecorded += 1
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(_Inside(self, self._block))

    def _which_adapters(self) -> Any:
        layer: Any = self._adapter
        if layer is None:
            return None
        return layer.disable_adapters, tuple(layer.active_adapters), tuple(getattr(layer, "merged_adapters", ()))

    def merged(self) -> str | None:
        """What is amiss where adapters were merged into weights that are written to, or taken out of them."""
        if self.writes and self._adapters is not None and self._which_adapters()[-1] != self._adapters[-1]:
            return _MERGED
        return None

    def is_in(self, block: object) -> bool:
        return self._block is block

    def refuse_copies(self) -> None:
        """A model that is copied or pickled takes its hooks along: they ask here.

        Raises:
            RuntimeError: its weights are perturbed in place, so the copy's would be for good.
        """
        if self.writes:
            raise RuntimeError(
                "the model's weights are perturbed at this moment: copy or save it outside `with opt.perturbed():`, "
                "or call opt.restore() first"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        self.refuse_copies()
        return Watch(None)

    def __reduce__(self) -> tuple[Any, ...]:
        self.refuse_copies()
        return Watch, (None,)


def _same_memory(given: Tensor, weight: Tensor) -> bool:
    if given is weight:
        return True
    while torch._C._functorch.is_functorch_wrapped_tensor(given):
        given = torch._C._functorch.get_unwrapped(given)
    return bool(torch._C._is_alias_of(given, weight))  # type: ignore[attr-defined]


def _class_attribute(module: nn.Module) -> Any:
    return getattr(type(module), "disable_adapters", None)


def drop_copies(module: nn.Module) -> None:
    """A copied model carries copies of its original's hooks, which nobody drives."""
    for handle, hook in list(module._forward_hooks.items()):
        if getattr(hook, "is_copy", False):
            del module._forward_hooks[handle]
            module._forward_hooks_with_kwargs.pop(handle, None)


class _Inside:
    """On a gradient's way: whether the descent that its tensor was computed in still lasts."""

    def __init__(self, watch: Watch, block: object) -> None:
        self._watch, self._block = watch, block

    def __call__(self, gradient: Tensor) -> None:
        if not self._watch.is_in(self._block):
            raise RuntimeError(_LEFT)
