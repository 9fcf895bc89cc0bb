"""An optimizer that is its base to whoever uses one: the base's own groups, state, defaults and hooks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..interop.deepspeed import USE

# LBFGS runs its closure as often as it likes, SAMs perturb by themselves, sparse optimizers have no dense gradient.
_REFUSED = ("LBFGS", "SparseAdam", "SAM", "GSAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM")

# What Accelerate puts around DeepSpeed's optimizer, and what stands for it until it is made.
_DEEPSPEEDS = ("DeepSpeedOptimizerWrapper", "DummyOptim")


class OptimizerWrapper(Optimizer):
    """What a wrapper and its base have in common; ``Optimizer.__init__`` is not called, the base's was.

    Args:
        base: an instance of a torch optimizer.

    Raises:
        TypeError: something that is not a torch optimizer instance, or one that cannot be wrapped.
    """

    def __init__(self, base: Optimizer) -> None:
        _check_base(base)
        self.base = base

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
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)


def _check_base(base: Any) -> None:
    if isinstance(base, type):
        raise TypeError(
            f"base_optimizer is the class {base.__name__}: pass an instance, {base.__name__}(model.parameters(), …)"
        )
    if any(kind.__module__.startswith("deepspeed.") or kind.__name__ in _DEEPSPEEDS for kind in type(base).__mro__):
        raise TypeError(f"base_optimizer is a {type(base).__name__} and the model no engine: {USE}")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer is a {type(base).__name__}: expected an instance of a torch.optim.Optimizer")
    if isinstance(base, OptimizerWrapper):
        raise TypeError(f"base_optimizer is a {type(base).__name__} already: wrap its base once")
    if any(kind.__name__ in _REFUSED for kind in type(base).__mro__):
        raise TypeError(
            f"{type(base).__name__} cannot be wrapped: it calls closures by itself, perturbs by itself, "
            "or needs sparse gradients"
        )
