"""trl's trainers with the fused head: every loss and every metric is what it is with trl's own head."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import shapo_kernels as sk
from shapo.integrations import FusedHeadMixin, ShaPOArguments, ShaPOTrainerMixin
from shapo_kernels import losses

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow
logging.getLogger("trl").setLevel(logging.ERROR)


class FusedDPOTrainer(FusedHeadMixin, trl.DPOTrainer):
    pass


class FusedSFTTrainer(FusedHeadMixin, trl.SFTTrainer):
    pass


class ShaPODPOTrainer(ShaPOTrainerMixin, trl.DPOTrainer):
    pass


def run(kind, model, tokenizer, folder, *, options=None, **keywords: Any):
    """The trainer after two updates from the same weights, and what it logged."""
    from datasets import Dataset

    rows = [{"prompt": f"question {i}", "chosen": f" a kind answer {i}", "rejected": f" no {i}"} for i in range(6)]
    if issubclass(kind, trl.SFTTrainer):
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    config = trl.SFTConfig if issubclass(kind, trl.SFTTrainer) else trl.DPOConfig
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": 64,
        "disable_tqdm": True,
        "seed": 0,
        **({"precompute_ref_log_probs": True} if config is trl.DPOConfig else {}),
        **(options or {}),
    }
    trainer = kind(
        model,
        args=config(str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        **keywords,
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def assert_equal_logs(ours, theirs):
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - TIMES:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=2e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["ipo"]},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["sigmoid_norm"], "ld_alpha": 0.5},
    ],
    ids=lambda options: "+".join(options["loss_type"]),
)
def test_losses_and_metrics_of_dpo_are_those_of_trls_head(options, tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    plain = copy.deepcopy(tiny_llama)
    _, theirs = run(trl.DPOTrainer, plain, tiny_tokenizer, tmp_path / "plain", options=options)
    asked = []
    real = losses.linear_token_logps
    monkeypatch.setattr(losses, "linear_token_logps", lambda *a, **k: asked.append(k) or real(*a, **k))
    _, ours = run(FusedDPOTrainer, tiny_llama, tiny_tokenizer, tmp_path / "fused", options=options, fused_head="on")
    assert len(asked) == 3 + 2  # the references of three batches, beforehand, and two updates
    assert {"entropy", "logits/chosen", "logps/chosen", "rewards/margins", "mean_token_accuracy"} <= ours[0].keys()
    assert_equal_logs(ours, theirs)
    # The policy is its own reference: made the same way, the first rewards are 0 to the last bit.
    assert ours[0]["rewards/chosen"] == 0
    for one, other in zip(tiny_llama.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_reference_model_is_asked_the_same_way(tiny_llama, tiny_tokenizer, tmp_path):
    options, reference = {"precompute_ref_log_probs": False}, copy.deepcopy(tiny_llama)
    logs = []
    for kind, keywords in ((trl.DPOTrainer, {}), (FusedDPOTrainer, {"fused_head": "on"})):
        model, other = copy.deepcopy(tiny_llama), copy.deepcopy(reference)
        keywords = {**keywords, "ref_model": other}
        logs.append(run(kind, model, tiny_tokenizer, tmp_path / kind.__name__, options=options, **keywords)[1])
    assert_equal_logs(*reversed(logs))
    assert logs[1][0]["rewards/chosen"] == 0


def test_fine_tuning_by_trl_has_the_loss_and_metrics_of_trls_head(tiny_llama, tiny_tokenizer, tmp_path):
    plain = copy.deepcopy(tiny_llama)
    _, theirs = run(trl.SFTTrainer, plain, tiny_tokenizer, tmp_path / "plain")
    _, ours = run(FusedSFTTrainer, tiny_llama, tiny_tokenizer, tmp_path / "fused", fused_head="on")
    assert_equal_logs(ours, theirs)


@pytest.mark.parametrize("ascent", ["selective", "grad"])
def test_shapo_in_trl_with_the_fused_head_is_shapo_with_trls_head(ascent, tiny_llama, tiny_tokenizer, tmp_path):
    sizes = {name: p.shape[1] for name, p in tiny_llama.named_parameters() if "down_proj" in name}
    shapo = ShaPOArguments(sk.Subspace.random(sizes, 5, seed=0), rho=0.5, ascent=ascent)
    logs = [
        run(ShaPODPOTrainer, copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path / head, shapo=shapo, fused_head=head)[
            1
        ]
        for head in ("off", "on")
    ]
    assert "shapo/gap" in logs[1][0]
    assert_equal_logs(*reversed(logs))


def test_what_the_fused_head_cannot_serve_is_refused_or_left_to_trl(tiny_llama, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="fused_head is 'yes': expected"):
        run(FusedDPOTrainer, tiny_llama, tiny_tokenizer, tmp_path, fused_head="yes")
    with pytest.raises(ValueError, match="because use_weighting needs"):
        run(FusedDPOTrainer, tiny_llama, tiny_tokenizer, tmp_path, options={"use_weighting": True}, fused_head="on")
    trainer, _ = run(
        FusedDPOTrainer,
        copy.deepcopy(tiny_llama),
        tiny_tokenizer,
        tmp_path,
        options={"use_weighting": True},
        fused_head="auto",
    )
    assert not hasattr(trainer.model.forward, "shapo_fused_head")
    hooked = copy.deepcopy(tiny_llama)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="its head has hooks"):
        run(FusedDPOTrainer, hooked, tiny_tokenizer, tmp_path, fused_head="on")
