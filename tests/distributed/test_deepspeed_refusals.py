"""What is refused of DeepSpeed, in one line: stand-ins carry the names and marks by which it is recognised."""

import pytest
import torch
from torch import nn

import shapo_kernels as sk


class DeepSpeedEngine(nn.Module):
    """What an engine says of itself."""

    optimizer = basic_optimizer = None
    has_moe_layers = zenflow = False
    mp_world_size = sequence_parallel_size = 1

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)

    def fp16_enabled(self):
        return False

    def torch_autocast_enabled(self):
        return self.torch_autocast_dtype() is not None

    def torch_autocast_dtype(self):
        return None

    def is_deepcompile_enabled(self):
        return False


class PipelineEngine(DeepSpeedEngine):
    pass


class Float16Engine(DeepSpeedEngine):
    def fp16_enabled(self):
        return True


class Float16AutocastEngine(DeepSpeedEngine):
    def torch_autocast_dtype(self):
        return torch.float16


class ExpertsEngine(DeepSpeedEngine):
    has_moe_layers = True


class TensorParallelEngine(DeepSpeedEngine):
    mp_world_size = 2


class SequenceParallelEngine(DeepSpeedEngine):
    sequence_parallel_size = 2


class CompilingEngine(DeepSpeedEngine):
    def is_deepcompile_enabled(self):
        return True


class ZenFlowEngine(DeepSpeedEngine):
    zenflow = True


def wrap(model, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return sk.ShaPOOptimizer(base, model, sk.Subspace({"weight": [1]}), rho=0.1, **options)


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        (PipelineEngine, "pipeline parallelism"),
        (Float16Engine, "float16"),
        (Float16AutocastEngine, "float16"),
        (ExpertsEngine, "mixture-of-experts"),
        (TensorParallelEngine, "tensor parallelism"),
        (SequenceParallelEngine, "sequence parallelism"),
        (CompilingEngine, "DeepCompile"),
        (ZenFlowEngine, "ZenFlow"),
    ],
)
def test_what_an_engine_does_with_weights_otherwise_is_refused(engine, what):
    said = rf"^the model cannot be perturbed: DeepSpeed with {what}.* is not supported: use it without, or fully_shard$"
    with pytest.raises(sk.SubspaceError, match=said):
        wrap(engine(nn.Linear(4, 2)))


def test_an_engine_inside_a_model_is_refused():
    with pytest.raises(sk.SubspaceError, match=r"a DeepSpeed engine is inside it: pass the engine itself"):
        wrap(nn.Sequential(DeepSpeedEngine(nn.Linear(4, 2))))


def test_another_optimizer_than_the_engines_is_refused():
    with pytest.raises(TypeError, match=r"^base_optimizer is a SGD that does not step the engine: pass .*$"):
        wrap(DeepSpeedEngine(nn.Linear(4, 2)))


@pytest.mark.parametrize("mark", ["ds_id", "ds_tensor", "_hp_mapping"])
def test_parameters_that_zero_holds_are_refused(mark):
    model = nn.Linear(4, 2)
    setattr(model.weight, mark, None)  # a mark is there or not, whatever it holds
    with pytest.raises(sk.SubspaceError, match=r"DeepSpeed has its parameters: make the engine first, then"):
        wrap(model)


class ZeROOptimizer:
    pass


ZeROOptimizer.__module__ = "deepspeed.runtime"


class DeepSpeedOptimizerWrapper(torch.optim.SGD):
    """As Accelerate's own is called."""


@pytest.mark.parametrize("base", [ZeROOptimizer(), DeepSpeedOptimizerWrapper(nn.Linear(4, 2).parameters())])
def test_its_optimizers_are_refused_as_a_base(base):
    with pytest.raises(TypeError, match=r"^base_optimizer is a \w+ and the model no engine: make the engine first"):
        sk.ShaPOOptimizer(base, nn.Linear(4, 2), sk.Subspace({"weight": [1]}), rho=0.1)


def test_a_model_that_zero_3_emptied_is_refused_at_the_first_use():
    model = nn.Linear(4, 2)
    opt = wrap(model)
    model.weight.ds_id, model.weight.data = 0, torch.empty(0)
    with pytest.raises(ValueError, match=r"^DeepSpeed has its parameters: make the engine first"), opt.ascent():
        pass


def test_an_optimizer_that_deepspeed_takes_over_afterwards_is_refused_at_its_first_use():
    model = nn.Linear(4, 2)
    opt = wrap(model)
    model.weight._hp_mapping = None
    with pytest.raises(ValueError, match=r"^DeepSpeed has its parameters: make the engine first"), opt.ascent():
        opt.ascend(model(torch.randn(3, 4)).sum())
    with pytest.raises(ValueError, match=r"^DeepSpeed has its parameters: make the engine first"):
        opt.step(lambda: model(torch.randn(3, 4)).sum())
