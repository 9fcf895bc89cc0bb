"""ShaPO in transformers' Trainer and trl's DPOTrainer, tiny models: equal to a loop written out, counted once (T1)."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments, ShaPOTrainerMixin

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainingArguments  # noqa: E402


class InOrder:
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class ShaPOTrainer(ShaPOTrainerMixin, InOrder, Trainer):
    pass


class PlainTrainer(InOrder, Trainer):
    pass


def neurons(model: torch.nn.Module) -> sk.Subspace:
    return sk.Subspace.random(
        {name: p.shape[1] for name, p in model.named_parameters() if "down_proj" in name}, 5, seed=0
    )


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def arguments(folder, **options: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def sgd(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, None]:
    return torch.optim.SGD(model.parameters(), lr=0.1), None


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("interval", [1, 2])
def test_a_trainers_updates_equal_a_loop_written_out(tiny_llama, tmp_path, interval):
    by_hand = copy.deepcopy(tiny_llama)
    subspace = neurons(tiny_llama)
    trainer = ShaPOTrainer(
        tiny_llama,
        arguments(tmp_path),
        train_dataset=rows(),
        optimizers=sgd(tiny_llama),
        shapo=ShaPOArguments(subspace, rho=0.5, interval=interval),
    )
    trainer.train()

    opt = sk.ShaPOOptimizer(
        torch.optim.SGD(by_hand.parameters(), lr=0.1), by_hand, subspace, rho=0.5, interval=interval
    )
    data = torch.stack([row["input_ids"] for row in rows()])
    due = []
    for start in (0, 4, 8):
        micro = [data[start : start + 2], data[start + 2 : start + 4]]

        def loss(tokens):
            return by_hand(input_ids=tokens, labels=tokens).loss / 2

        due.append(opt.due)
        with opt.ascent():
            for tokens in micro:
                opt.ascend(loss(tokens))
        with opt.perturbed():
            for tokens in micro:
                loss(tokens).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(tiny_llama.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert trainer._shapo_optimizer().updates == 3
    assert ["shapo/gap" in entry for entry in logged(trainer)] == due
    assert all(entry["shapo/gap"] > 0 for entry in logged(trainer) if "shapo/gap" in entry)


def test_the_gap_is_what_the_perturbation_adds(tiny_llama, tmp_path):
    trainer = ShaPOTrainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5)
    )
    trainer.train()
    for entry in logged(trainer):
        assert entry["loss"] == pytest.approx(entry["shapo/ascent_loss"] + entry["shapo/gap"], abs=2e-4)


def test_a_warm_start_is_plain(tiny_llama, tmp_path):
    shapo = ShaPOArguments(neurons(tiny_llama), rho=0.5, plain_updates=2)
    trainer = ShaPOTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=shapo)
    trainer.train()
    assert ["shapo/gap" in entry for entry in logged(trainer)] == [False, False, True]


def test_bfloat16_autocast_perturbs_beside_the_weights(tiny_llama, tmp_path):
    shapo = ShaPOArguments(neurons(tiny_llama), rho=1e-3)
    trainer = ShaPOTrainer(tiny_llama, arguments(tmp_path, bf16=True), train_dataset=rows(), shapo=shapo)
    trainer.train()
    assert all(entry["shapo/realised_cosine"] > 0.999 for entry in logged(trainer))


def test_resuming_from_a_trainers_checkpoint_is_bit_exact(tiny_llama, tmp_path):
    def trainer(model, **options):
        shapo = ShaPOArguments(neurons(model), rho=0.5, interval=2)
        return ShaPOTrainer(
            model,
            arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, learning_rate=0.01, **options),
            train_dataset=rows(),
            shapo=shapo,
        )

    again = copy.deepcopy(tiny_llama)
    trainer(tiny_llama).train()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for a, b in zip(tiny_llama.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_exception_in_training_leaves_the_weights_restored(tiny_llama, tmp_path):
    before = [p.detach().clone() for p in tiny_llama.parameters()]

    class Failing(ShaPOTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 4:  # two micro-batches ascend, the second of the descent fails
                raise KeyError("boom")
            return super().compute_loss(*args, **kwargs)

    trainer = Failing(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5)
    )
    with pytest.raises(KeyError):
        trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(tiny_llama.parameters(), before, strict=True))


def test_a_shapo_optimizer_without_the_mixin_says_what_to_do(tiny_llama, tmp_path):
    opt = sk.ShaPOOptimizer(sgd(tiny_llama)[0], tiny_llama, neurons(tiny_llama), rho=0.5)
    trainer = PlainTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows(), optimizers=(opt, None))
    with pytest.raises(RuntimeError, match="ShaPOTrainerMixin"):
        trainer.train()


@pytest.mark.parametrize("options", [{"ascent_fraction": 0.0}, {"ascent_fraction": 1.5}, {"plain_updates": -1}])
def test_arguments_out_of_range_are_refused(tiny_llama, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ShaPOArguments(neurons(tiny_llama), rho=0.5, **options)


def preference_rows(count: int) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": f"question {i}", "chosen": f" a kind answer {i}", "rejected": f" a rude one {i}"}
            for i in range(count)
        ]
    )


def dpo_trainer(kind, model, tokenizer, folder, rows=8, **options):
    from trl import DPOConfig

    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "precompute_ref_log_probs": True,
        "max_length": 64,
        "disable_tqdm": True,
        "dataset_num_proc": None,
    }
    shapo = options.pop("shapo", None)
    return kind(
        model,
        args=DPOConfig(str(folder), **{**settings, **options}),
        train_dataset=preference_rows(rows),
        processing_class=copy.deepcopy(tokenizer),
        **({"shapo": shapo} if shapo else {}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_trls_dpo_trainer_trains_and_counts_metrics_and_tokens_once(tiny_llama, tiny_tokenizer, tmp_path, fraction):
    trl = pytest.importorskip("trl")
    logging.getLogger("trl").setLevel(logging.ERROR)

    class ShaPODPOTrainer(ShaPOTrainerMixin, trl.DPOTrainer):
        pass

    plain = dpo_trainer(trl.DPOTrainer, copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path / "plain")
    plain.train()
    shapo = ShaPOArguments(neurons(tiny_llama), rho=0.5, ascent_fraction=fraction)
    before = copy.deepcopy(tiny_llama)
    ours = dpo_trainer(ShaPODPOTrainer, tiny_llama, tiny_tokenizer, tmp_path / "shapo", shapo=shapo)
    passes = []
    real = ours.compute_loss
    ours.compute_loss = lambda *a, **k: passes.append(a[1]["input_ids"].shape[0]) or real(*a, **k)
    ours.train()
    assert passes == ([4, 4, 4, 4] if fraction == 1 else [2, 2, 4, 4]) * 2
    mine, theirs = logged(ours), logged(plain)
    assert [entry["num_tokens"] for entry in mine] == [entry["num_tokens"] for entry in theirs]
    assert all({"shapo/gap", "shapo/ascent_loss", "rewards/accuracies"} <= set(entry) for entry in mine)
    # The first update starts from the same weights in both runs: its ascent's loss is the plain trainer's loss.
    if fraction == 1:
        assert mine[0]["shapo/ascent_loss"] == pytest.approx(theirs[0]["loss"], abs=1e-4)
        assert mine[0]["logps/chosen"] == pytest.approx(theirs[0]["logps/chosen"], rel=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(tiny_llama.parameters(), before.parameters(), strict=True))


@pytest.mark.slow
def test_a_reference_model_that_would_run_twice_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    trl = pytest.importorskip("trl")

    class ShaPODPOTrainer(ShaPOTrainerMixin, trl.DPOTrainer):
        pass

    shapo = ShaPOArguments(neurons(tiny_llama), rho=0.5)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        dpo_trainer(ShaPODPOTrainer, tiny_llama, tiny_tokenizer, tmp_path, shapo=shapo, precompute_ref_log_probs=False)


def test_logs_can_be_written_as_json(tiny_llama, tmp_path):
    trainer = ShaPOTrainer(
        tiny_llama, arguments(tmp_path), train_dataset=rows(), shapo=ShaPOArguments(neurons(tiny_llama), rho=0.5)
    )
    trainer.train()
    assert json.loads(json.dumps(trainer.state.log_history)) == trainer.state.log_history
