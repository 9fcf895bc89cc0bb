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

    torch.save([train(case) for case in cases], f"{folder}/{os.environ.get('RANK', '0')}.pt")
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


def test_a_trainer_on_two_ranks_equals_one_process(tmp_path):
    (alone,) = train(tmp_path / "one", 1, CASES)
    for rank in train(tmp_path / "two", 2, CASES):
        for (parameters, logs), (expected, expected_logs) in zip(rank, alone, strict=True):
            for mine, other in zip(parameters, expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            assert len(logs) == len(expected_logs) > 0
            for mine, other in zip(logs, expected_logs, strict=True):
                assert mine == pytest.approx(other, rel=2e-3, abs=1e-4)
