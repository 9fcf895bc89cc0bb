"""What is assumed of accelerate, PEFT and torch; a name that a release drops fails here by that name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from shapo.libraries import accelerate, peft
from shapo.libraries import torch as ours
from shapo_kernels.interop.names import COMPILED, REPLICATED


@pytest.mark.parametrize("name", accelerate.OPTIMIZER)
def test_accelerates_optimizer_has(name):
    from accelerate import Accelerator

    inner = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    wrapped = Accelerator(cpu=True).prepare(inner)
    assert type(wrapped).__name__ == "AcceleratedOptimizer"
    assert getattr(wrapped, name) is inner
    assert accelerate.beneath(wrapped) is accelerate.beneath(inner) is inner


@pytest.mark.parametrize("name", accelerate.ACCELERATOR)
def test_the_accelerator_has(name):
    from accelerate import Accelerator

    assert hasattr(Accelerator(cpu=True), name)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("bitsandbytes", ["Failed to load CPU gemm_4bit_forward"]),
        ("deepspeed", ["Setting accelerator to CPU"]),
        ("torchao.optim", ["Failed to load", "Enum subclass"]),
    ],
)
def test_what_a_library_logs_as_it_is_imported_is_left_out(name, messages):
    pytest.importorskip(name)
    program = f"from shapo.libraries import quiet_imports; quiet_imports(); import {name}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [message for message in messages if message in done.stdout + done.stderr] == []


@pytest.mark.parametrize("name", accelerate.STATE)
def test_the_state_of_a_process_has(name):
    from accelerate import PartialState

    PartialState()
    assert "distributed_type" in getattr(PartialState, name)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), True),
        (torch.distributed.DistBackendError("NCCL error: unhandled system error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("gloo"), False),
    ],
)
def test_a_lost_rank_is_distinguished_from_other_errors(error, lost):
    assert ours.lost_a_rank(error) is lost


def test_pefts_models_have_what_is_read_of_them(tiny_llama):
    library = pytest.importorskip("peft")

    prompt = library.get_peft_model(tiny_llama, library.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    for name in peft.MODEL:
        assert hasattr(prompt, name), name
    for name in peft.CONFIG:
        assert hasattr(prompt.active_peft_config, name), name
    assert peft.is_peft(prompt)
    assert peft.adds_tokens(prompt)
    assert not peft.is_peft(tiny_llama)
    assert not peft.adds_tokens(tiny_llama)


@pytest.mark.parametrize("name", ours.MODULE)
def test_a_module_has(name):
    assert not getattr(nn.Linear(1, 1), name)


def test_hooks_are_seen():
    layer = nn.Linear(1, 1)
    assert not ours.has_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert ours.has_hooks(layer)
        handle.remove()
    assert not ours.has_hooks(layer)


def test_wrappers_keep_their_model_where_it_is_looked_for():
    layer = nn.Linear(1, 1)
    assert dict(nn.DataParallel(layer).named_children())[REPLICATED] is layer
    assert dict(torch.compile(layer).named_children())[COMPILED] is layer


@pytest.mark.parametrize("name", ours.FSDP2)
def test_a_module_that_fsdp2_shards_has(name):
    from torch.distributed.fsdp import FSDPModule

    assert callable(getattr(FSDPModule, name))
    assert not ours.is_sharded_alone(nn.Linear(1, 1))
