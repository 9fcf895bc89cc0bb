"""A trainer's steps that 16-bit weights do not take."""

from __future__ import annotations

import warnings

import pytest
import torch

from shapo.integrations import FusedHeadMixin, ShaPOArguments

transformers = pytest.importorskip("transformers")
from tests.support.trainers import ShaPOTrainer, arguments, neurons, rows  # noqa: E402


class Counting(transformers.TrainerCallback):
    """The share of all elements with a gradient that each step moves, by comparing every one of them."""

    def __init__(self, model):
        self.model, self.shares = model, []

    def on_pre_optimizer_step(self, *_, **__):
        self.before = [(p, p.detach().clone(), p.grad != 0) for p in self.model.parameters() if p.grad is not None]

    def on_optimizer_step(self, *_, **__):
        moved = sum(int(((p != old) & meant).sum()) for p, old, meant in self.before)
        self.shares.append(moved / sum(int(meant.sum()) for *_, meant in self.before))


class FusedTrainer(FusedHeadMixin, transformers.Trainer):
    pass


@pytest.mark.parametrize("kind", [ShaPOTrainer, FusedTrainer])
def test_the_share_is_logged_after_the_warm_up_and_its_loss_is_warned_of(kind, tiny_llama, tmp_path):
    model = tiny_llama.bfloat16()
    options = {"shapo": ShaPOArguments(neurons(model), rho=0.5)} if kind is ShaPOTrainer else {}
    told = arguments(tmp_path, max_steps=8, warmup_steps=2, learning_rate=1e-5, optim="adamw_torch", logging_steps=1)
    counting = Counting(model)
    trainer = kind(model, told, train_dataset=rows(), callbacks=[counting], **options)
    with pytest.warns(UserWarning, match="% of the elements of the bfloat16 weights; the rest of the step is lost"):
        trainer.train()
    shares = [entry.get("moved") for entry in trainer.state.log_history if "loss" in entry]
    assert [share is not None for share in shares] == [False] * 2 + [True] * 5 + [False]
    assert shares[2:7] == pytest.approx(counting.shares[2:7])
    assert 0 < max(shares[2:7]) < 0.5


def test_fp32_weights_are_not_measured(tiny_llama, tmp_path):
    trainer = ShaPOTrainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an update moves")
        trainer.train()
    assert not any("moved" in entry for entry in trainer.state.log_history)


def test_a_part_of_a_weight_on_this_rank_is_enough(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    from shapo.training.rounding import StepRounding

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(torch.ones(8).bfloat16(), mesh, [Replicate()]))
        weight.grad = distribute_tensor(torch.ones(8).bfloat16(), mesh, [Replicate()])
        watch = StepRounding([weight], warmup=0, total=2)
        watch.before(0)
        with torch.no_grad():
            weight.to_local()[:2] += 1
        assert watch.after() == {"moved": 0.25}
    finally:
        dist.destroy_process_group()
