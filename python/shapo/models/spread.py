"""A model that rank 0 alone has read.

The other ranks are given its structure with weights on the meta device, which take no memory. Weights follow when the
training engine has said where each belongs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shapo.ranks import Ranks


def read_once(ranks: Ranks, make: Callable[[], Any]) -> Any:
    """What `make()` returns on rank 0, and on the others its `skeleton` (a collective).

    Raises:
        UserError: `make` raised one; on every rank.
    """
    made: list[Any] = []

    def run() -> nn.Module | None:
        made.append(make())
        return skeleton(made[0]) if ranks.count > 1 else None

    other = ranks.on_main(run)
    return made[0] if made else other


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device, and its buffers on the CPU."""
    weights: dict[int, Tensor] = {id(weight): _meta(weight) for weight in model.parameters()}
    buffers = {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    return copy.deepcopy(model, weights | buffers)


def emptied(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by all their names; the model itself then has them on the meta device alone."""
    weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    replace_parameters(model, _meta)
    return weights


def allocated(weight: nn.Parameter, device: torch.device) -> nn.Parameter:
    """A parameter on the meta device with memory on `device` and without values; any other as it is."""
    return _like(weight, torch.empty_like(weight, device=device)) if weight.is_meta else weight


def replace_parameters(model: nn.Module, new: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Puts `new(parameter)` in each parameter's place, once for all places of a tied one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = new(parameter)
                module._parameters[name] = made[parameter]


def _meta(weight: nn.Parameter) -> nn.Parameter:
    return _like(weight, weight.detach().to("meta"))


def _like(weight: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=weight.requires_grad)
