"""Whether a base optimizer trains the model it is given with, and whether a pass has left it a gradient.

Every check answers in the certain case only: sharded models and engines keep parameters and gradients of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import warn
from ..interop import deepspeed, fsdp
from ..interop.torch_private import has_gradient_hooks, is_dtensor
from ..model.targets import Target
from ..reference.rounding import HALVES
from .base import Base


def check_trains(base: Base, model: nn.Module) -> None:
    """Raises ValueError where the base has parameters, none of them the model's, and the model is not frozen.

    In float32 beside a 16-bit model they may be master weights, which a loop of its own copies to and fro: a warning.
    """
    given, own = _parameters_of(base), list(model.parameters())
    if not given or not any(parameter.requires_grad for parameter in own):
        return
    if not {id(p) for p in given}.isdisjoint(id(p) for p in own) or _kept_elsewhere(model, given):
        return
    if all(p.dtype == torch.float32 for p in given) and all(p.dtype in HALVES for p in own if p.requires_grad):
        warn(
            "base_optimizer has no parameter of the model: right for float32 master weights that your loop copies into "
            "it, else its steps train another model"
        )
        return
    name = type(base.optimizer).__name__
    raise ValueError(
        "base_optimizer has no parameter of the model, so its steps would train another one: make it as "
        f"{name}(model.parameters(), …) from this very model, after the model was copied or converted"
    )


def warn_of_untrained(base: Base, before: Sequence[Target], after: Sequence[Target]) -> None:
    """Warns of a weight that the base trained and that another parameter, which it does not have, has replaced."""
    trained = {id(parameter) for parameter in _parameters_of(base)}
    was_trained = {target.name for target in before if id(target.parameter) in trained}
    for target in after:
        parameter = target.parameter
        if target.name in was_trained and parameter.requires_grad and id(parameter) not in trained:
            warn(
                f"{target.name!r} was replaced by another parameter, which is perturbed but not trained: the base "
                "optimizer does not have it; call opt.add_param_group({'params': [the new parameter]})"
            )


def no_gradient(model: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether no backward pass can have reached these parameters; reads no values, and stops at the first gradient."""
    waiting = []
    for parameter in parameters:
        if parameter.grad is not None:
            return False
        if parameter.requires_grad and parameter.numel():
            waiting.append(parameter)
    # A hook may have taken the gradient away.
    return bool(waiting) and not any(map(has_gradient_hooks, waiting)) and not _kept_elsewhere(model, waiting)


def _parameters_of(base: Base) -> list[Tensor]:
    return [parameter for _, parameters in base.members() for parameter in parameters]


def _kept_elsewhere(model: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether an engine or a sharding has parameters or gradients of the model in places of its own."""
    return (
        deepspeed.is_engine(model)
        or deepspeed.why_not(model) is not None
        or fsdp.is_version_1(model)
        or any(map(is_dtensor, (*parameters, *model.parameters())))
        or any(True for _ in fsdp.meshes(model))
    )
