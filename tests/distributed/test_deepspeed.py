"""DeepSpeed is refused in one line: stand-ins carry the names and marks by which its engine and ZeRO are recognised."""

import pytest
import torch
from torch import nn

import shapo_kernels as sk


class DeepSpeedEngine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class PipelineEngine(DeepSpeedEngine):
    pass


def wrap(model, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return sk.ShaPOOptimizer(base, model, sk.Subspace({"weight": [1]}), rho=0.1, **options)


@pytest.mark.parametrize("engine", [DeepSpeedEngine, PipelineEngine])
def test_an_engine_is_refused(engine):
    with pytest.raises(sk.SubspaceError, match=r"^the model cannot be perturbed: DeepSpeed .* use fully_shard .*$"):
        wrap(engine(nn.Linear(4, 2)))


@pytest.mark.parametrize("mark", ["ds_id", "ds_tensor", "_hp_mapping"])
def test_parameters_that_zero_holds_are_refused(mark):
    model = nn.Linear(4, 2)
    setattr(model.weight, mark, None)  # a mark is there or not, whatever it holds
    with pytest.raises(sk.SubspaceError, match=r"DeepSpeed .* is not supported"):
        wrap(model)


class ZeROOptimizer:
    pass


ZeROOptimizer.__module__ = "deepspeed.runtime"


class DeepSpeedOptimizerWrapper(torch.optim.SGD):
    """As Accelerate's own is called."""


@pytest.mark.parametrize("base", [ZeROOptimizer(), DeepSpeedOptimizerWrapper(nn.Linear(4, 2).parameters())])
def test_its_optimizers_are_refused_as_a_base(base):
    with pytest.raises(TypeError, match=r"^base_optimizer is a \w+: DeepSpeed .* use fully_shard .*$"):
        sk.ShaPOOptimizer(base, nn.Linear(4, 2), sk.Subspace({"weight": [1]}), rho=0.1)


def test_a_model_that_zero_3_emptied_is_refused_at_the_first_use():
    model = nn.Linear(4, 2)
    opt = wrap(model)
    model.weight.ds_id, model.weight.data = 0, torch.empty(0)
    with pytest.raises(ValueError, match=r"^DeepSpeed .* is not supported: use fully_shard .*$"), opt.ascent():
        pass


def test_an_optimizer_that_deepspeed_takes_over_afterwards_is_refused_at_its_first_use():
    model = nn.Linear(4, 2)
    opt = wrap(model)
    model.weight._hp_mapping = None
    with pytest.raises(ValueError, match=r"DeepSpeed .* is not supported"), opt.ascent():
        opt.ascend(model(torch.randn(3, 4)).sum())
    with pytest.raises(ValueError, match=r"DeepSpeed .* is not supported"):
        opt.step(lambda: model(torch.randn(3, 4)).sum())
