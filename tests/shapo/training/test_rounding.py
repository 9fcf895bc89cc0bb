"""The share of 16-bit weights that the base optimizer's step moves."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data.formats import load_pairs
from shapo.scoring.logps import TokenizedPairs
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences
from shapo.training.rounding import StepRounding
from shapo.training.sft import train_sft
from shapo_kernels import Subspace


def stepping(weight: torch.Tensor, gradient: torch.Tensor, *, lr: float, warmup: int = 0, total: int = 5):
    """The optimizer, the scheduler and the watch of one parameter with a constant gradient."""
    parameter = nn.Parameter(weight)
    optimizer = torch.optim.SGD([parameter], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / max(1, warmup)))
    watch = StepRounding([parameter], scheduler, warmup=warmup, total=total)

    def step() -> dict[str, float]:
        parameter.grad = gradient.clone()
        values = watch.step(optimizer)
        scheduler.step()
        return values

    return step


def test_the_share_is_of_the_elements_whose_step_passes_half_their_spacing() -> None:
    # Behind 1 the next bfloat16 lies 2^-7 away, so 2^-9 moves nothing there; at 2^-3 the spacing is 2^-10.
    weight = torch.cat([torch.ones(30), torch.full((10,), 0.125)]).bfloat16()
    step = stepping(weight, -torch.full((40,), 2.0**-9).bfloat16(), lr=1.0, total=1)
    with pytest.warns(UserWarning, match=r"an update moves 25.0 % of the elements of the bfloat16 weights"):
        assert step() == {"moved": 0.25}


def test_elements_without_a_gradient_are_not_counted() -> None:
    gradient = torch.cat([torch.ones(10), torch.zeros(30)]).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stepping(torch.ones(40).bfloat16(), gradient, lr=0.5, total=1)() == {"moved": 1.0}


def test_large_tensors_are_sampled() -> None:
    weight = torch.tensor([1.0, 0.0]).repeat(150_000).bfloat16()  # every second element moves
    step = stepping(weight, torch.full((300_000,), 2.0**-9).bfloat16(), lr=1.0, total=2)
    assert step()["moved"] == pytest.approx(0.5, abs=0.01)


def test_the_warm_up_is_waited_for_and_the_run_is_measured_for_five_updates() -> None:
    step = stepping(torch.ones(8).bfloat16(), torch.ones(8).bfloat16(), lr=0.5, warmup=3, total=20)
    assert [bool(step()) for _ in range(12)] == [False] * 3 + [True] * 5 + [False] * 4


def test_a_run_shorter_than_its_warm_up_is_measured_at_its_end() -> None:
    step = stepping(torch.ones(8).bfloat16(), torch.ones(8).bfloat16(), lr=0.5, warmup=30, total=7)
    assert [bool(step()) for _ in range(7)] == [False] * 2 + [True] * 5


def test_fp32_weights_are_not_measured() -> None:
    assert stepping(torch.ones(8), torch.ones(8), lr=1e-12)() == {}


@pytest.mark.parametrize("kind", ["plain", "shapo", "sft"])
def test_training_warns_of_steps_that_are_lost_and_logs_the_share(
    kind, tiny_llama, tiny_encoder, synthetic_rows, tmp_path
):
    pairs = load_pairs(synthetic_rows["train"][:6])
    options = {"output": tmp_path, "progress": False}
    config = LoopConfig(updates=7, batch_size=6, lr=1e-6, warmup=1)
    shapo = ShaPOConfig(rho=0.5) if kind == "shapo" else None
    neurons = Subspace({"model.layers.0.mlp.down_proj.weight": [1, 5]}) if shapo else None
    examples, data = [(pair.prompt, pair.chosen) for pair in pairs], TokenizedPairs(pairs, tiny_encoder)

    def train() -> None:
        model = tiny_llama.bfloat16()
        if kind == "sft":
            train_sft(model, tiny_encoder, examples, config=config, **options)
        else:
            train_preferences(model, data, loss=LossConfig(), loop=config, shapo=shapo, subspace=neurons, **options)

    with pytest.warns(UserWarning, match="lost to rounding. Keep the weights in float32"):
        train()
    shares = [row.get("moved") for row in read_metrics(tmp_path / "metrics.jsonl", "update")]
    assert [share is not None for share in shares] == [False] + [True] * 5 + [False]
    assert all(0 <= share < 0.2 for share in shares[1:6])
