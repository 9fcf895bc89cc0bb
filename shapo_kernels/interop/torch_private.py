"""Every private part of torch that this library reads, one function each.

Each docstring says what the use assumes and what happens where the assumption fails. `tests/interop/test_private.py`
has a test of the same name for each, so that a torch release that changes one is told by name.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as _module


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor.

    `torch.distributed.tensor` takes about a second to import, so it is not imported for the question: where nobody
    has, there is none. Public API.
    """
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def is_fake(value: object) -> bool:
    """Whether a value is a tensor of torch's `FakeTensorMode`: a shape on a device, and no contents.

    Assumes `torch._subclasses.fake_tensor.FakeTensor`, which is imported where there is one. Where that has gone,
    fake tensors are taken for quantised ones.
    """
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(value, fake.FakeTensor)


# -- hooks


def forward_hooks(module: nn.Module) -> OrderedDict[int, Any]:
    """A module's own forward hooks, in the order they run. Assumes `Module._forward_hooks`, keyed by handle id."""
    return cast("OrderedDict[int, Any]", module._forward_hooks)


def remove_forward_hook(module: nn.Module, handle_id: int) -> None:
    """Removes a hook whose handle is lost. Assumes `Module._forward_hooks` and `_forward_hooks_with_kwargs`."""
    module._forward_hooks.pop(handle_id, None)
    module._forward_hooks_with_kwargs.pop(handle_id, None)


def global_forward_hooks() -> tuple[int, ...]:
    """The ids of the forward hooks of every module. Assumes `torch.nn.modules.module._global_forward_hooks`."""
    return tuple(_module._global_forward_hooks)


def global_forward_pre_hooks() -> tuple[int, ...]:
    """As :func:`global_forward_hooks`. Assumes `torch.nn.modules.module._global_forward_pre_hooks`."""
    return tuple(_module._global_forward_pre_hooks)


def forward_pre_hooks(module: nn.Module) -> OrderedDict[int, Any]:
    """A module's own forward pre-hooks, in the order they run. Assumes `Module._forward_pre_hooks`."""
    return cast("OrderedDict[int, Any]", module._forward_pre_hooks)


def call_of(module: nn.Module) -> tuple[Callable[..., Any] | None, Callable[..., Any]]:
    """What `Module.compile` has a module call in place of its forward and hooks, if so, and what a call calls now.

    Assumes `Module._compiled_call_impl`, `None` where there is none, and `_call_impl`.
    """
    compiled = module.__dict__.get("_compiled_call_impl")
    return compiled, compiled or module._call_impl


def call_in_place_of(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """From now on a call of the module calls this in place of its forward and hooks; `None`: these again.

    Assumes `Module._compiled_call_impl`, which copies and pickles of a module leave out.
    """
    # Not by setattr, which torch.compile's wrapper hands on to the module inside.
    if call is None:
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module.__dict__["_compiled_call_impl"] = call


# -- autograd


def saved_tensors_are_hooked() -> bool:
    """Whether `saved_tensors_hooks`, a checkpoint's for instance, are at work.

    Assumes `torch._C._autograd._top_saved_tensors_default_hooks`.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether hooks run where a gradient is accumulated. Assumes `Tensor._post_accumulate_grad_hooks`."""
    return bool(parameter._post_accumulate_grad_hooks)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to. Assumes `Tensor._version`; 0 for an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """What a tensor is a view of; `None` where it is none. Assumes `Tensor._base`."""
    return tensor._base


def without_view(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The same memory in another shape, no view to autograd: it may be written to, and hooks may hang on it.

    Assumes `aten::_unsafe_view`.
    """
    return torch.ops.aten._unsafe_view(tensor, shape)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Raises where a bool on the device is false, without waiting for it. Assumes `torch._assert_async`."""
    torch._assert_async(condition, message)


def keep_versions(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Writes inside do not count as writes. Assumes `torch.autograd._unsafe_preserve_version_counter`."""
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))


def in_backward() -> bool:
    """Whether a backward pass is running on this thread. Assumes `torch._C._current_graph_task_id`, -1 for none."""
    return torch._C._current_graph_task_id() != -1


def in_functorch() -> bool:
    """Whether vmap or another torch.func transform is active. Assumes `_are_functorch_transforms_active`."""
    return torch._C._are_functorch_transforms_active()


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are views of one storage, torch.func's wrappers seen through.

    Assumes `torch._C._functorch.get_unwrapped` and `torch._C._is_alias_of`.
    """
    if first is second:
        return True
    while torch._C._functorch.is_functorch_wrapped_tensor(first):
        first = torch._C._functorch.get_unwrapped(first)
    return bool(torch._C._is_alias_of(first, second))  # type: ignore[attr-defined]


def storage_place(tensor: Tensor) -> tuple[int, int]:
    """Equal for tensors that begin at one place of one storage. Assumes `UntypedStorage._cdata`, an address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


# -- operators and process groups


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator (`"library::name"`) is implemented for a dispatch key (`"CPU"`, `"CUDA"`).

    Assumes `torch._C._dispatch_has_kernel_for_dispatch_key`.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def group_of_name(name: str) -> Any:
    """The process group of a name, which operators pass on as a string. Assumes `_resolve_process_group`."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


# -- engines


@contextmanager
def ddp_without_sink(model: Any) -> Iterator[None]:
    """`no_sync` for DistributedDataParallel with a static graph.

    The node that DDP puts behind the first forward pass would reduce gradients that `no_sync` has not prepared. Here
    forward passes leave it out. Assumes `_pre_forward` and `_run_ddp_forward`.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = model._pre_forward(*args, **kwargs)
        return model._run_ddp_forward(*args, **kwargs)

    model.forward = forward
    try:
        with model.no_sync():
            yield
    finally:
        del model.forward


def hidden_by_ddp(parameter: Tensor) -> bool:
    """Whether DDP made a plain tensor of a tensor-parallel parameter. Assumes the mark `_st_info`."""
    return hasattr(parameter, "_st_info")


class Fsdp2Parameter(NamedTuple):
    parameter: nn.Parameter
    mesh: Any
    names_mesh_dims: bool


def fsdp2_parameters(module: Any) -> Iterator[Fsdp2Parameter]:
    """The parameters that `fully_shard` manages in one module, with their data-parallel mesh.

    Assumes `_get_fsdp_state` and its `_fsdp_param_group` (up to torch 2.11) or `_fsdp_param_groups`, each with
    `fsdp_params` that have `mesh_info.mesh` and `_module_info`.
    """
    state = module._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
        for managed in group.fsdp_params if group is not None else ():
            where = managed._module_info
            yield Fsdp2Parameter(
                getattr(where.module, where.param_name),
                managed.mesh_info.mesh,
                getattr(managed.mesh_info, "dp_mesh_dims", None) is not None,
            )


class Fsdp1Piece(NamedTuple):
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int


class Fsdp1Handle(NamedTuple):
    keeps_parameters: bool
    is_sharded: bool
    shard_group: Any
    replica_group: Any
    pieces: list[Fsdp1Piece]


def fsdp1_handle(module: Any) -> Fsdp1Handle | None:
    """What one FullyShardedDataParallel module holds; `None` where it holds nothing.

    Assumes `_handle` with `_use_orig_params`, `uses_sharded_strategy`, `process_group` and `flat_param`'s
    `_params`, `_shapes` and `_shard_param_infos`, and `_inter_node_pg` for hybrid sharding.
    """
    handle = module._handle
    if handle is None:
        return None
    keeps, pieces = bool(handle._use_orig_params), []
    if keeps:
        flat = handle.flat_param
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = (info.intra_param_start_idx or 0) if info.in_shard else 0
            pieces.append(Fsdp1Piece(parameter, tuple(shape), start))
    between = getattr(module, "_inter_node_pg", None)
    return Fsdp1Handle(keeps, bool(handle.uses_sharded_strategy), handle.process_group, between, pieces)


def fsdp1_is_outermost(module: Any) -> bool:
    """Whether FSDP1 has found, in a forward pass, that no other unit is around this one. Assumes `_is_root`."""
    return bool(module._is_root)
