"""ShaPO in a Trainer and in an Accelerate loop on two ranks: what one process does with the same pairs (S12, S13)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

WORKER = textwrap.dedent(
    """
    import os
    import sys
    import torch
    from accelerate import Accelerator
    from accelerate.state import GradientState
    from torch import nn
    from torch.utils.data import SequentialSampler
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    import shapo_kernels as sk
    from shapo.integrations import ShaPOArguments, ShaPOTrainerMixin

    class ShaPOTrainer(ShaPOTrainerMixin, Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    world, folder, cases = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
    torch.set_num_threads(1)
    tokens = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.clone()} for row in tokens]

    def train(options):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
        subspace = sk.Subspace({f"model.layers.{i}.mlp.down_proj.weight": [1, 9, 40] for i in range(2)})
        trainer = ShaPOTrainer(
            model,
            TrainingArguments(
                folder, per_device_train_batch_size=2, gradient_accumulation_steps=4 // world, max_steps=2,
                max_grad_norm=1.0, lr_scheduler_type="constant", report_to=[], use_cpu=True, logging_steps=1,
                save_strategy="no", disable_tqdm=True, ddp_backend="gloo" if world > 1 else None,
            ),
            train_dataset=rows,
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
            shapo=ShaPOArguments(subspace, rho=0.5, **options),
        )
        trainer.train()
        keys = ("loss", "grad_norm", "shapo/ascent_loss", "shapo/gap", "shapo/grad_norm")
        logs = [[entry[key] for key in keys] for entry in trainer.state.log_history if "shapo/gap" in entry]
        return [p.detach() for p in model.parameters()], logs

    def accelerate_loop(each):
        # Two micro-batches an update, spread over the ranks. Accelerate keeps one state a process: not the trainer's.
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(0)
        model = accelerator.prepare(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)))
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        shapo = sk.ShaPOOptimizer(base, model, sk.Subspace({"2.weight": [3, 9]}), rho=0.3)
        opt = accelerator.prepare(shapo)
        data = torch.randn(3, 2, 8, 11, generator=torch.Generator().manual_seed(1))
        rank = accelerator.process_index

        def loss(batch):
            return (model(batch[:, :8]) - batch[:, 8:]).square().mean()

        for update in data:
            micro_batches = [micro.chunk(world)[rank] for micro in update]
            for number, micro in enumerate(micro_batches):
                with accelerator.accumulate(model):
                    if each:
                        with shapo.ascent():
                            shapo.ascend(loss(micro))
                        with shapo.perturbed():
                            accelerator.backward(loss(micro))
                    else:
                        if number == 0:
                            with shapo.ascent():
                                for one in micro_batches:
                                    shapo.ascend(loss(one) / 2)
                            shapo.perturb()
                        accelerator.backward(loss(micro))
                        if accelerator.sync_gradients:
                            shapo.restore()
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    opt.step()
                    opt.zero_grad()
        assert shapo.updates == 3
        return [p.detach() for p in model.parameters()]

    ends = {"trainer": [train(case) for case in cases], "accelerate": [accelerate_loop(e) for e in (False, True)]}
    torch.save(ends, f"{folder}/{os.environ.get('RANK', '0')}.pt")
    """
)
CASES = [{}, {"ascent": "grad"}, {"perturbation": "delta", "interval": 2}]


def train(folder, world, cases):
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        if world > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", WORKER, str(world), str(folder), repr(cases)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    try:
        assert [process.wait(timeout=150) for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What one process has at the end, and what each of two ranks has."""
    folder = tmp_path_factory.mktemp("ranks")
    return train(folder / "one", 1, CASES)[0], train(folder / "two", 2, CASES)


def test_a_trainer_on_two_ranks_equals_one_process(ends):
    alone, ranks = ends
    for rank in ranks:
        for (parameters, logs), (expected, expected_logs) in zip(rank["trainer"], alone["trainer"], strict=True):
            for mine, other in zip(parameters, expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            assert len(logs) == len(expected_logs) > 0
            for mine, other in zip(logs, expected_logs, strict=True):
                assert mine == pytest.approx(other, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("each", [False, True], ids=["one perturbation", "one for each micro-batch"])
def test_an_accelerate_loop_with_accumulation_on_two_ranks_equals_one_process(ends, each):
    alone, ranks = ends
    for rank in ranks:
        for mine, other in zip(rank["accelerate"][each], alone["accelerate"][each], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert not torch.equal(alone["accelerate"][0][0], alone["accelerate"][1][0])
