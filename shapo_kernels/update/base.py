"""What takes the steps: a torch optimizer, or an engine that owns one. Others know only :class:`Base`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import without_reduction
from ..interop import deepspeed

# LBFGS runs its closure as often as it likes, SAMs perturb by themselves, sparse optimizers have no dense gradient.
_UNSUITABLE = ("LBFGS", "SparseAdam", "SAM", "GSAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM")

# What Accelerate puts around DeepSpeed's optimizer, and its placeholder for one.
_DEEPSPEEDS = ("DeepSpeedOptimizerWrapper", "DummyOptim")


class Base(Protocol):
    """Takes the steps of a :class:`shapo_kernels.ShaPOOptimizer`."""

    #: Why `.grad` does not hold the gradients; `None` where it does.
    why_no_gradients: str | None
    #: Whether `step` may be called inside the descent, which it then ends.
    steps_in_descent: bool

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose groups, state, defaults and hooks are the wrapper's."""

    def attach(self, wrapper: Optimizer) -> None:
        """From now on the wrapper's steps are the ones that count."""

    def detach(self) -> None:
        """Undoes :meth:`attach`."""

    def members(self) -> Iterator[tuple[dict[str, Any], Sequence[Tensor]]]:
        """Each param group and the model's parameters in it."""

    def without_reduction(self, model: nn.Module, *, selective: bool) -> AbstractContextManager[None]:
        """Forward and backward passes inside reduce no gradients over ranks.

        Args:
            selective: no parameter gets a gradient.
        """

    def check_step(self, closure: Any, scaler: Any) -> None:
        """Raises TypeError for arguments of `step` that the base does not take."""

    def ends_update(self) -> bool:
        """Whether a call of `step` ends an update. A call that only counts a micro-batch is counted here."""

    def take_step(self, closure: Callable[[], Any] | None = None) -> tuple[Any, bool]:
        """Steps. Returns what the step returns, and whether weights were updated."""


class TorchBase:
    """A torch optimizer.

    Raises:
        TypeError: something that is not a torch optimizer instance, or one that cannot be wrapped.
    """

    why_no_gradients: str | None = None
    steps_in_descent = False

    def __init__(self, optimizer: Optimizer) -> None:
        if (reason := _why_not_base(optimizer)) is not None:
            raise TypeError(reason)
        self.optimizer = optimizer

    def attach(self, wrapper: Optimizer) -> None:
        pass

    def detach(self) -> None:
        pass

    def members(self) -> Iterator[tuple[dict[str, Any], Sequence[Tensor]]]:
        return ((group, group["params"]) for group in self.optimizer.param_groups)

    def without_reduction(self, model: nn.Module, *, selective: bool) -> AbstractContextManager[None]:
        return without_reduction(model, selective=selective)

    def check_step(self, closure: Any, scaler: Any) -> None:
        if scaler is not None and closure is None:
            raise TypeError("a scaler is given to step() beside a closure; without one, call scaler.step(opt)")

    def ends_update(self) -> bool:
        return True

    def take_step(self, closure: Callable[[], Any] | None = None) -> tuple[Any, bool]:
        return (self.optimizer.step() if closure is None else self.optimizer.step(closure)), True


class BaseFacade(Optimizer):
    """An optimizer whose groups, state, defaults and hooks are its base's own objects.

    `Optimizer.__init__` is not called: the base's was.
    """

    def __init__(self, base: Base) -> None:
        self._base = base

    @property
    def base(self) -> Optimizer:
        """The base optimizer; around a DeepSpeed engine, the engine's step."""
        return self._base.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own list."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's own defaults."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        # Hooks and whatever else is the base's: registered here, they run inside its step, once and in torch's order.
        if name in ("_base", "base"):
            raise AttributeError(name)
        return getattr(self._base.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)


def base_for(optimizer: Optimizer, model: nn.Module) -> Base:
    """The base that an optimizer is for a model.

    Raises:
        TypeError: as :class:`TorchBase`, or an optimizer that is not the engine's.
    """
    if deepspeed.is_engine(model) and deepspeed.why_not(model) is None:
        return deepspeed.EngineStep(model, optimizer)
    return TorchBase(optimizer)


def _why_not_base(optimizer: Any) -> str | None:
    kind = type(optimizer)
    if isinstance(optimizer, type):
        name = optimizer.__name__
        return f"base_optimizer is the class {name}: pass an instance, {name}(model.parameters(), …)"
    if any(k.__module__.startswith("deepspeed.") or k.__name__ in _DEEPSPEEDS for k in kind.__mro__):
        return f"base_optimizer is a {kind.__name__} and the model no engine: {deepspeed.USE}"
    if not isinstance(optimizer, Optimizer):
        return f"base_optimizer is a {kind.__name__}: expected an instance of a torch.optim.Optimizer"
    if isinstance(optimizer, BaseFacade):
        return f"base_optimizer is a {kind.__name__} already: wrap its base once"
    if any(k.__name__ in _UNSUITABLE for k in kind.__mro__):
        return (
            f"{kind.__name__} cannot be wrapped: it calls closures by itself, perturbs by itself, "
            "or needs sparse gradients"
        )
    return None
