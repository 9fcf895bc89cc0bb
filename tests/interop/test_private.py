"""What is read of torch's and DeepSpeed's private parts is still there: one test for each use, by its name."""

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from shapo_kernels.interop import torch_private as private


def test_is_dtensor_knows_one_and_imports_nothing_for_the_question(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    assert private.is_dtensor(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    assert not private.is_dtensor(torch.ones(2))
    modules = sys.modules.pop("torch.distributed.tensor")
    try:
        assert not private.is_dtensor(torch.ones(2))
        assert "torch.distributed.tensor" not in sys.modules
    finally:
        sys.modules["torch.distributed.tensor"] = modules


def test_is_fake_knows_a_tensor_without_contents():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert private.is_fake(torch.ones(2))
        assert private.is_fake(nn.Parameter(torch.ones(2)))
    assert not private.is_fake(torch.ones(2))


def test_has_gradient_hooks_knows_hooks_after_accumulation_alone():
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_hook(lambda grad: grad)
    assert not private.has_gradient_hooks(parameter)
    handle = parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    assert private.has_gradient_hooks(parameter)
    handle.remove()
    assert not private.has_gradient_hooks(parameter)


def test_forward_hooks_lists_a_modules_own_in_their_order():
    layer, calls = nn.Linear(2, 2), []
    late = layer.register_forward_hook(lambda *_: calls.append("late"))
    early = layer.register_forward_hook(lambda *_: calls.append("early"), prepend=True)
    assert list(private.forward_hooks(layer)) == [early.id, late.id]
    private.forward_hooks(layer).move_to_end(late.id, last=False)
    layer(torch.ones(1, 2))
    assert calls == ["late", "early"]


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_remove_forward_hook_leaves_nothing_of_it(with_kwargs):
    layer, calls = nn.Linear(2, 2), []
    handle = layer.register_forward_hook(lambda *_: calls.append(1), with_kwargs=with_kwargs)
    private.remove_forward_hook(layer, handle.id)
    layer(torch.ones(1, 2))
    assert not calls
    assert not layer._forward_hooks_with_kwargs


def test_global_forward_hooks_names_a_hook_while_it_is_registered():
    before = private.global_forward_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert set(private.global_forward_hooks()) - set(before) == {handle.id}
    handle.remove()
    assert private.global_forward_hooks() == before


def test_global_forward_pre_hooks_names_a_hook_while_it_is_registered():
    before = private.global_forward_pre_hooks()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert set(private.global_forward_pre_hooks()) - set(before) == {handle.id}
    handle.remove()
    assert private.global_forward_pre_hooks() == before


def test_forward_pre_hooks_lists_a_modules_own():
    layer = nn.Linear(2, 2)
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert list(private.forward_pre_hooks(layer)) == [handle.id]


def test_call_of_tells_a_compiled_module():
    layer = nn.Linear(2, 2)
    assert private.call_of(layer)[0] is None
    assert torch.equal(private.call_of(layer)[1](torch.ones(1, 2)), layer(torch.ones(1, 2)))
    layer.compile(backend="eager")
    assert private.call_of(layer)[0] is private.call_of(layer)[1] is not None


def test_call_in_place_of_takes_the_place_of_forward_and_hooks_and_is_not_copied():
    layer, calls = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    private.call_in_place_of(layer, lambda x: x + 1)
    assert layer(torch.ones(2)).tolist() == [2, 2]
    assert not calls
    copy.deepcopy(layer)(torch.ones(1, 2))
    assert calls == ["hook"]
    private.call_in_place_of(layer, None)
    layer(torch.ones(1, 2))
    assert calls == ["hook", "hook"]
    assert private.call_of(layer)[0] is None


def test_saved_tensors_are_hooked_inside_a_checkpoint_alone():
    seen = []
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: seen.append(private.saved_tensors_are_hooked()) or x * 2, x, use_reentrant=False)
    assert seen == [True]
    assert not private.saved_tensors_are_hooked()


def test_version_counts_writes_and_is_0_for_inference_tensors():
    tensor = torch.ones(2)
    then = private.version(tensor)
    tensor.mul_(2)
    assert private.version(tensor) == then + 1
    with torch.inference_mode():
        assert private.version(torch.ones(2)) == 0


def test_base_of_is_what_a_view_is_taken_from():
    base = torch.arange(6.0)
    assert private.base_of(base.view(2, 3)) is base
    assert private.base_of(base) is None


def test_without_view_shares_memory_and_is_no_view():
    rows = torch.arange(6.0)
    shaped = private.without_view(rows, torch.Size([2, 3]))
    assert shaped.data_ptr() == rows.data_ptr()
    assert private.base_of(shaped) is None


def test_assert_on_device_raises_the_message():
    private.assert_on_device(torch.tensor(True), "unseen")
    with pytest.raises(RuntimeError, match="a label is wrong"):
        private.assert_on_device(torch.tensor(False), "a label is wrong")


def test_has_kernel_tells_implementations_apart():
    assert private.has_kernel("aten::addmm", "CPU")
    assert not private.has_kernel("aten::_flash_attention_forward", "CPU")


def test_group_of_name_finds_the_group(group):
    assert private.group_of_name(dist.group.WORLD.group_name).size() == 1


def test_keep_versions_hides_a_write_from_autograd():
    weight = torch.ones(2, requires_grad=True)
    product = weight * torch.arange(2.0)
    squared = (product * product).sum()
    with private.keep_versions([product]), torch.no_grad():
        product.mul_(1)
    squared.backward()
    assert weight.grad.tolist() == [0, 2]


def test_in_backward_holds_in_a_backward_pass_alone():
    seen = []
    x = torch.ones(1, requires_grad=True)
    (x * 2).register_hook(lambda _: seen.append(private.in_backward()))
    y = x * 2
    y.register_hook(lambda _: seen.append(private.in_backward()))
    assert not private.in_backward()
    y.sum().backward()
    assert seen == [True]
    assert not private.in_backward()


def test_in_functorch_holds_inside_vmap_alone():
    seen = []
    torch.func.vmap(lambda x: (seen.append(private.in_functorch()), x)[1])(torch.ones(2))
    assert seen == [True]
    assert not private.in_functorch()


def test_share_memory_sees_through_views_and_transforms():
    base = torch.arange(6.0)
    assert private.share_memory(base[1:], base)
    assert private.share_memory(base, base)
    assert not private.share_memory(base.clone(), base)
    seen = []
    torch.func.grad(lambda x: (seen.append(private.share_memory(x, base)), x.sum())[1])(base)
    assert seen == [True]


def test_storage_place_is_one_for_tensors_that_begin_together():
    base = torch.arange(6.0)
    assert private.storage_place(base) == private.storage_place(base.view(2, 3))
    assert private.storage_place(base) != private.storage_place(base[1:])
    assert private.storage_place(base) != private.storage_place(base.clone())


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield
    dist.destroy_process_group()


def test_ddp_without_sink_computes_as_ddp_does_and_gives_its_forward_back(group):
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2), static_graph=True)
    x = torch.ones(1, 3)
    with private.ddp_without_sink(model):
        inside = model(x)
        assert type(inside.grad_fn).__name__ == "AddmmBackward0"
    assert "forward" not in vars(model)
    assert torch.equal(inside, model.module(x))


def test_hidden_by_ddp_looks_for_the_mark_that_ddp_sets():
    assert not private.hidden_by_ddp(nn.Parameter(torch.ones(1)))
    source = Path(importlib.util.find_spec("torch.distributed.tensor.parallel.ddp").origin).read_text()
    assert "_st_info" in source


def test_fsdp2_parameters_gives_each_parameter_and_its_mesh(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = fully_shard(nn.Linear(3, 2), mesh=mesh)
    found = list(private.fsdp2_parameters(model))
    assert {id(parameter) for parameter, _, _ in found} == {id(p) for p in model.parameters()}
    assert all(m == mesh and not names for _, m, names in found)


def test_fsdp1_handle_gives_the_pieces_of_the_flat_parameter(group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=True, device_id=torch.device("cpu"))
    handle = private.fsdp1_handle(model)
    assert handle.keeps_parameters
    assert not handle.is_sharded  # on a single rank it turns to NO_SHARD
    assert [piece.shape for piece in handle.pieces] == [(2, 3), (2,)]
    assert {id(piece.parameter) for piece in handle.pieces} == {id(p) for p in model.parameters()}
    assert handle.shard_group is not None
    hidden = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"))
    assert not private.fsdp1_handle(hidden).keeps_parameters
    assert not private.fsdp1_handle(hidden).pieces
    assert private.fsdp1_handle(FullyShardedDataParallel(nn.ReLU(), device_id=torch.device("cpu"))) is None


def test_fsdp1_is_outermost_after_a_forward_pass_alone(group):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    inner = FSDP(nn.Linear(3, 3), device_id=torch.device("cpu"))
    outer = FSDP(nn.Sequential(inner), device_id=torch.device("cpu"))
    assert not private.fsdp1_is_outermost(outer)
    outer(torch.ones(1, 3))
    assert private.fsdp1_is_outermost(outer)
    assert not private.fsdp1_is_outermost(inner)


# Each attribute that interop/deepspeed.py reads, and the file of the package that gives it.
DEEPSPEED = {
    "runtime/engine.py": (
        "class DeepSpeedEngine",
        "def fp16_enabled",
        "def torch_autocast_enabled",
        "def torch_autocast_dtype",
        "has_moe_layers",
        "mp_world_size",
        "sequence_parallel_size",
        "def is_deepcompile_enabled",
        "self.zenflow",
        "seq_data_parallel_group",
        "def is_gradient_accumulation_boundary",
        "def was_step_applied",
        "inside_no_sync_ctxt",
        "basic_optimizer",
    ),
    "runtime/zero/stage3.py": ("sub_group_to_group_id", "self.fp16_groups", "_leaf_module_hooks"),
    "runtime/zero/stage_1_and_2.py": ("self.bit16_groups",),
    "runtime/zero/partition_parameters.py": (
        "ds_tensor",
        "ds_id",
        "ds_shape",
        "ds_numel",
        "ds_process_group",
        "ds_zero_partition_rank",
        "ds_quant_scale",
    ),
    "runtime/bf16_optimizer.py": ("bf16_groups",),
    "utils/mixed_precision_linkage.py": ("_hp_mapping",),
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in DEEPSPEED.items() for name in names])
def test_deepspeed_still_has(file, name):
    spec = importlib.util.find_spec("deepspeed")
    if spec is None:
        pytest.skip("deepspeed is not installed")
    source = (Path(spec.origin).parent / file).read_text()
    assert re.search(rf"{re.escape(name)}\b", source), f"deepspeed's {file} has no {name!r} any more"
