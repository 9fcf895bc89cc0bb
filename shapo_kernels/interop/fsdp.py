"""PyTorch's FSDP1 and FSDP2 (`fully_shard`): which weights they manage, and what an ascent needs of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import UnsupportedLayout
from . import torch_private
from .sharding import Run


def meshes(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """The id of each parameter that `fully_shard` (or `replicate`) manages, and its data-parallel mesh.

    Raises:
        UnsupportedLayout: a mesh whose dimensions are named.
    """
    for module in _modules_of(model, "FSDPModule"):
        for parameter, mesh, names_mesh_dims in torch_private.fsdp2_parameters(module):
            if names_mesh_dims:
                raise UnsupportedLayout(
                    "fully_shard(dp_mesh_dims=…) is not supported: shard plain or tensor-parallel weights on the "
                    "data-parallel mesh"
                )
            yield id(parameter), mesh


def runs(model: nn.Module) -> Iterator[tuple[int, Run]]:
    """The id of each parameter that FSDP1 manages, and where this rank's piece lies.

    Raises:
        UnsupportedLayout: a wrapper that hides the weights, or that shards nothing.
    """
    for module in _modules_of(model, "FullyShardedDataParallel"):
        handle = torch_private.fsdp1_handle(module)
        if handle is None:
            continue
        if not handle.keeps_parameters:
            raise UnsupportedLayout(
                "FullyShardedDataParallel hides the weights: pass use_orig_params=True, or use fully_shard"
            )
        if not handle.is_sharded:
            # After a backward pass that reaches no weight it does not put its parameters back, and pass 2 finds none.
            raise UnsupportedLayout(
                "FullyShardedDataParallel with NO_SHARD, which it turns to on a single rank, is not supported: use "
                "DistributedDataParallel, or the model as it is"
            )
        shards = (handle.shard_group,)
        data = (*shards, handle.replica_group) if handle.replica_group is not None else shards
        for parameter, shape, start in handle.pieces:
            yield id(parameter), Run(shape, start, parameter.numel(), shards, data)


def is_version_1(model: nn.Module) -> bool:
    """Whether FSDP1 has some of the model."""
    return any(True for _ in _modules_of(model, "FullyShardedDataParallel"))


def reshard(model: nn.Module) -> None:
    """Puts sharded parameters back: `fully_shard` leaves gathered ones in place after an evaluation."""
    for module in _modules_of(model, "FSDPModule"):
        module.reshard()


def check_outermost(model: nn.Module) -> None:
    """Raises where FSDP1's outermost module is around the model, so that its `no_sync` is out of reach.

    FSDP1 knows its outermost module after a forward pass only, so this is called after one.

    Raises:
        UnsupportedLayout: gradients that were there before an ascent would be in FSDP1's way.
    """
    units = list(_modules_of(model, "FullyShardedDataParallel"))
    if units and not any(torch_private.fsdp1_is_outermost(unit) for unit in units):
        raise UnsupportedLayout(
            "the model is inside a FullyShardedDataParallel that the optimizer was not given: make it around that one"
        )


def _modules_of(model: nn.Module, kind: str) -> Iterator[Any]:
    """Modules of a class of `torch.distributed.fsdp`. It takes seconds to import; where nobody has, there is none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return iter(())
    return (module for module in model.modules() if isinstance(module, getattr(fsdp, kind)))
