"""DeepSpeed (ZeRO stages 0 to 3): its engine takes the steps, and the wrapper asks it to.

`deepspeed.initialize` takes the base optimizer's parameters and gives it partitions of its own, so an update is
`engine.step()`. The base of a :class:`shapo_kernels.ShaPOOptimizer` around an engine is that step, and
`engine.step()` becomes the wrapper's. The ascent calls the engine's module, not the engine, whose outputs start the
reduction of gradients. Accelerate steps at the end of its backward pass, inside the descent; that ends the descent.

deepspeed is not imported: an engine is recognised by its class's name. Private attributes are read in this module only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedLayout
from .sharding import Run

USE = "make the engine first, then ShaPOOptimizer(engine.optimizer, engine, …)"
# What ZeRO-3 puts on parameters it has partitioned, and ZeRO-1 and 2 on those whose optimizer state they have.
_MARKS = ("ds_id", "ds_tensor", "_hp_mapping")


def is_engine(model: object) -> bool:
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def why_not(model: nn.Module) -> str | None:
    """Why a model that DeepSpeed has to do with cannot be perturbed, and what to do; `None` where it can."""
    if is_engine(model):
        return _unsupported(model)
    if any(map(is_engine, model.modules())):
        return f"a DeepSpeed engine is inside it: pass the engine itself: {USE}"
    if any(hasattr(parameter, mark) for parameter in model.parameters() for mark in _MARKS):
        return f"DeepSpeed has its parameters: {USE}"
    return None


def _unsupported(engine: Any) -> str | None:
    what = {
        "pipeline parallelism": any(kind.__name__ == "PipelineEngine" for kind in type(engine).__mro__),
        "float16": engine.fp16_enabled()
        or (engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16),
        "mixture-of-experts layers of its own": engine.has_moe_layers,
        "tensor parallelism": engine.mp_world_size > 1,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "DeepCompile": engine.is_deepcompile_enabled(),
        "ZenFlow": bool(engine.zenflow),
    }
    found = next((name for name, present in what.items() if present), None)
    return found and f"DeepSpeed with {found} is not supported: use it without, or fully_shard"


class EngineStep(Optimizer):
    """An engine's step as a :class:`shapo_kernels.update.base.Base`.

    Groups, state and defaults are those of the engine's optimizer.

    Args:
        engine: what `deepspeed.initialize` returned first.
        given: what it returned second, or what Accelerate put around it.

    Raises:
        TypeError: another optimizer than the engine's.
    """

    why_no_gradients: str | None = "DeepSpeed keeps the gradients in partitions of its own"
    steps_in_descent = True

    def __init__(self, engine: Any, given: object) -> None:
        # Optimizer.__init__ is not called: what it would set up is the engine's optimizer's.
        if all(engine.optimizer is not one for one in (given, getattr(given, "optimizer", given))):
            raise TypeError(
                f"base_optimizer is a {type(given).__name__} that does not step the engine: pass the optimizer that "
                "deepspeed.initialize returned, engine.optimizer"
            )
        self.engine = engine
        self._lr_kwargs: Any = None
        self._ran: RemovableHandle | None = None
        #: Whether the engine has stepped by itself, and nothing has been computed since.
        self._stepped = False

    # -- as an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the partitions that this rank updates. Schedulers write to them."""
        return self.engine.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.engine.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.engine.basic_optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "engine":
            raise AttributeError(name)
        return getattr(self.engine.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: the engine clears gradients in its step and keeps those of earlier micro-batches."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise RuntimeError("an engine's groups are fixed: add the group to the optimizer that DeepSpeed is given")

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError(
            "DeepSpeed saves an engine's optimizer: engine.save_checkpoint(folder, client_state={'shapo': "
            "opt.shapo_state_dict()}), and after load_checkpoint opt.load_shapo_state_dict(client_state['shapo'])"
        )

    def load_state_dict(self, state_dict: Any) -> None:
        self.state_dict()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an engine's optimizer is neither copied nor pickled: save it by engine.save_checkpoint")

    def step(self, closure: Any = None) -> bool:  # type: ignore[override]
        """The engine's own step. Returns whether weights were updated."""
        return self.take_step()[1]

    # -- as a base

    @property
    def optimizer(self) -> Optimizer:
        return self

    def attach(self, wrapper: Optimizer) -> None:
        """Makes `engine.step()` the wrapper's step.

        Raises:
            RuntimeError: it is another wrapper's. TypeError: the engine's optimizer does not say which of the model's
                parameters are in which group, as radii and `maximize` must know.
        """
        of_the_model = {id(parameter) for parameter in self.engine.module.parameters()}
        if not any(id(parameter) in of_the_model for _, members in self.members() for parameter in members):
            raise TypeError(
                f"the engine's {type(self.engine.optimizer).__name__} does not say which parameters are in its groups: "
                "use ZeRO, or the optimizer without it"
            )
        if "step" in vars(self.engine):
            raise RuntimeError("the engine's step is another ShaPOOptimizer's: call its detach() first")

        def step(lr_kwargs: Any = None) -> None:
            self._lr_kwargs, self._stepped, ends = lr_kwargs, False, not self._accumulating
            try:
                wrapper.step()
            finally:
                self._lr_kwargs = None
            self._stepped = ends

        def computed(module: nn.Module, args: Any) -> None:
            self._stepped = False

        self.engine.step = step
        self._ran = self.engine.module.register_forward_pre_hook(computed)

    def detach(self) -> None:
        """Gives `engine.step()` back."""
        vars(self.engine).pop("step", None)
        if self._ran is not None:
            self._ran.remove()

    def members(self) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
        """Each group and the model's parameters in it, which ZeRO keeps apart."""
        optimizer, groups = self.engine.optimizer, self.param_groups
        if hasattr(optimizer, "sub_group_to_group_id"):
            for part, parameters in enumerate(optimizer.fp16_groups):
                yield groups[optimizer.sub_group_to_group_id[part]], parameters
            return
        kept = next((k for k in ("bit16_groups", "bf16_groups", "fp16_groups") if hasattr(optimizer, k)), None)
        yield from zip(groups, getattr(optimizer, kept) if kept else (g["params"] for g in groups), strict=True)

    def without_reduction(self, model: nn.Module, *, selective: bool) -> AbstractContextManager[None]:
        return _own_forward(self.engine)

    def check_step(self, closure: Any, scaler: Any) -> None:
        if closure is not None or scaler is not None:
            raise TypeError(
                "DeepSpeed's engine takes gradients by engine.backward(loss) and scales losses itself: use "
                "`with opt.ascent():` and `with opt.perturbed():`, then opt.step() without a closure or scaler"
            )

    def ends_update(self) -> bool:
        if self._stepped:  # as Accelerate's backward() does, before the loop asks for a step
            return False
        accumulating = self._accumulating
        if accumulating and not self.engine.inside_no_sync_ctxt:  # there Accelerate counts by itself
            self.take_step()
        return not accumulating

    def take_step(self, closure: Any = None) -> tuple[Any, bool]:
        type(self.engine).step(self.engine, self._lr_kwargs)
        return None, bool(self.engine.was_step_applied())

    @property
    def _accumulating(self) -> bool:
        """Whether this micro-batch is not an update's last."""
        return not self.engine.is_gradient_accumulation_boundary()


def runs(engine: Any) -> Iterator[tuple[int, Run]]:
    """The id of each parameter that ZeRO-3 has partitioned, and where this rank's piece lies.

    Raises:
        UnsupportedLayout: pieces that are quantised or on a drive.
    """
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_tensor"):
            continue
        kept = parameter.ds_tensor
        start = min(parameter.ds_zero_partition_rank * kept.ds_numel, parameter.ds_numel)
        count = min(kept.ds_numel, parameter.ds_numel - start)
        if kept.numel() < count or hasattr(kept, "ds_quant_scale"):
            raise UnsupportedLayout(f"DeepSpeed keeps {name!r} quantised or on a drive: keep parameters on a device")
        shards = (parameter.ds_process_group,)
        yield id(parameter), Run(tuple(parameter.ds_shape), start, count, shards, (engine.seq_data_parallel_group,))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, whether or not ZeRO-3 has it gathered at this moment."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def _own_forward(engine: Any) -> Iterator[None]:
    """Calls of the engine run its module alone: a backward pass from its outputs reduces and keeps no gradients."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        lower = engine.torch_autocast_enabled()
        with torch.autocast(engine.device.type, dtype=engine.torch_autocast_dtype() if lower else None, enabled=lower):
            return engine.module(*args, **kwargs)

    def backward(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "engine.backward(loss) inside `with opt.ascent():` would add the ascent's gradients to the update's: hand "
            "the loss over by opt.ascend(loss)"
        )

    engine.forward, engine.backward = forward, backward
    try:
        with _without_hooks(getattr(engine.optimizer, "_leaf_module_hooks", ())):
            yield
    finally:
        del engine.forward, engine.backward


@contextmanager
def _without_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """ZeRO-3's leaf modules (experts, some of them idle) reduce zeros where a backward pass leaves no gradients."""
    taken = []
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            taken.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook
