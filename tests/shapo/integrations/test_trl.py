"""ShaPO in trl's DPOTrainer, tiny models: metrics, tokens and the reference counted once (T1), losses, adapters."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import shapo_kernels as sk
from shapo.integrations import ShaPOArguments, ShaPOTrainerMixin

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("trl").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


class ShaPODPOTrainer(ShaPOTrainerMixin, trl.DPOTrainer):
    pass


def neurons(model: torch.nn.Module) -> sk.Subspace:
    return sk.Subspace.random(
        {name: p.shape[1] for name, p in model.named_parameters() if "down_proj" in name}, 5, seed=0
    )


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def trainer(tiny_llama, tiny_tokenizer, tmp_path):
    """Makes a DPO trainer of a copy of the same model each time, with ShaPO where there is `shapo`."""
    rows = datasets.Dataset.from_list(
        [
            {"prompt": f"question {i}", "chosen": f" a kind answer {i}" * (1 + i % 3), "rejected": f" a rude one {i}"}
            for i in range(8)
        ]
    )

    def make(shapo: ShaPOArguments | None = None, *, ours: bool = True, peft_config: Any = None, **options: Any) -> Any:
        settings = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
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
        model = copy.deepcopy(tiny_llama)
        if ours:
            options = {**options, "shapo": shapo or ShaPOArguments(neurons(model), rho=0.5)}
        keywords = {name: options.pop(name) for name in ("shapo", "optimizers", "ref_model") if name in options}
        return (ShaPODPOTrainer if ours else trl.DPOTrainer)(
            model,
            args=trl.DPOConfig(str(tmp_path), **{**settings, **options}),
            train_dataset=rows,
            processing_class=copy.deepcopy(tiny_tokenizer),
            peft_config=peft_config,
            **keywords,
        )

    make.model = tiny_llama  # type: ignore[attr-defined]
    return make


def count_passes(trainer: Any) -> list[int]:
    """Rows of every call of `compute_loss`."""
    passes: list[int] = []
    real = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: passes.append(a[1]["input_ids"].shape[0]) or real(*a, **k)
    return passes


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({}, [4, 4, 4, 4]),
        ({"ascent_fraction": 0.5}, [4, 4, 4]),
        ({"ascent_pairs": 1}, [2, 4, 4]),
        ({"per_micro_batch": True}, [4, 4, 4, 4]),
        ({"per_micro_batch": True, "ascent_fraction": 0.5}, [2, 4, 2, 4]),
    ],
    ids=str,
)
def test_metrics_and_tokens_are_counted_once_and_both_losses_logged(trainer, part, expected):
    plain = trainer(ours=False)
    plain.train()
    ours = trainer(ShaPOArguments(neurons(trainer.model), rho=0.5, **part))
    passes = count_passes(ours)
    ours.train()
    assert passes == expected * 2
    mine, theirs = logged(ours), logged(plain)
    assert [entry["num_tokens"] for entry in mine] == [entry["num_tokens"] for entry in theirs]
    assert all({"shapo/gap", "shapo/ascent_loss", "rewards/accuracies"} <= set(entry) for entry in mine)
    assert mine[0]["shapo/ascent_loss"] == pytest.approx(theirs[0]["loss"], abs=1e-4)  # log 2, whichever the rows
    assert mine[0]["loss"] == pytest.approx(mine[0]["shapo/ascent_loss"] + mine[0]["shapo/gap"], abs=2e-4)
    if len(expected) == 4 and 2 not in expected:
        # The first update starts from the same weights in both runs, and the ascent sees them all.
        for name in ("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy"):
            assert mine[0][name] == pytest.approx(theirs[0][name], rel=1e-4), name


def test_the_reference_is_asked_once_for_each_micro_batch_and_before_the_weights_move(trainer):
    def run(**options: Any) -> tuple[Any, list[int]]:
        ours = trainer(max_steps=3, **options)
        asked: list[int] = []
        models = {id(m): m for m in (ours.model, ours.ref_model) if m is not None}
        for model in models.values():
            model.register_forward_hook(
                lambda module, args, kwargs, output: (
                    None if torch.is_grad_enabled() else asked.append(kwargs["input_ids"].shape[0])
                ),
                with_kwargs=True,
            )
        ours.train()
        return ours, asked

    precomputed, asked = run()
    assert asked == []
    by_model, asked = run(precompute_ref_log_probs=False, ref_model=copy.deepcopy(trainer.model))
    assert asked == [4, 4] * 3
    assert by_model.precompute_ref_logps is False
    for a, b in zip(precomputed.model.parameters(), by_model.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_adapters_policy_perturbs_its_frozen_base_and_its_reference_is_the_base_itself(trainer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    shapo = ShaPOArguments(neurons(trainer.model), rho=0.5)
    ends = []
    for precompute in (True, False):
        ours = trainer(shapo, peft_config=config, precompute_ref_log_probs=precompute, max_steps=3)
        ours.train()
        base = ours.model.get_base_model().model.layers[0].mlp.down_proj.weight
        assert torch.equal(base, trainer.model.model.layers[0].mlp.down_proj.weight)
        assert all(entry["shapo/gap"] > 0 for entry in logged(ours))
        ends.append([p for p in ours.model.parameters() if p.requires_grad])
    assert any(p.abs().max() > 1e-3 for p in ends[0])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_reference_that_follows_the_policy_is_asked_once_too(trainer):
    ours = trainer(
        precompute_ref_log_probs=False,
        ref_model=copy.deepcopy(trainer.model),
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        learning_rate=1e-2,
    )
    ours.train()
    assert logged(ours)[1]["shapo/ascent_loss"] == pytest.approx(0.6931, abs=2e-4)  # the policy is its reference again


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["aot"]},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_trls_losses_are_taken_as_they_are(trainer, options):
    plain, ours = trainer(ours=False, **options), trainer(**options)
    plain.train()
    ours.train()
    first = logged(ours)[0]
    assert first["shapo/ascent_loss"] == pytest.approx(logged(plain)[0]["loss"], rel=1e-3)
    assert first["shapo/gap"] > 0


def test_bfloat16_clipping_and_accumulation_together(trainer):
    norms: list[float] = []
    ours = trainer(ShaPOArguments(neurons(trainer.model), rho=1e-3), bf16=True, max_grad_norm=0.01)
    real = ours._clip_grad_norm
    ours._clip_grad_norm = lambda model: norms.append(1) or real(model)
    ours.train()
    assert len(norms) == 2
    assert all(entry["shapo/realised_cosine"] > 0.999 for entry in logged(ours))
    assert all(entry["grad_norm"] > 0.01 for entry in logged(ours))


def test_resuming_in_the_middle_of_an_interval_is_bit_exact_and_draws_the_same_rows(trainer, tmp_path):
    shapo = ShaPOArguments(neurons(trainer.model), rho=0.5, interval=2, ascent_pairs=1, plain_updates=1, rho_warmup=3)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole, again = trainer(shapo, **options), trainer(shapo, **options)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    due = ["shapo/gap" in entry for entry in logged(whole)]
    assert due == [False, True, False, True, False, True]
    numbers = ("shapo/ascent_loss", "shapo/epsilon_norm")
    assert [[e.get(n) for n in numbers] for e in logged(again)][3:] == [
        [e.get(n) for n in numbers] for e in logged(whole)
    ][3:]
