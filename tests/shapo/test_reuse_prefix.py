"""The command's loop and the trainers reuse the blocks below, and the weights come out the same."""

from __future__ import annotations

import copy

import pytest
import torch

import shapo_kernels as sk
from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data.formats import load_pairs
from shapo.integrations import ShaPOArguments
from shapo.scoring.logps import TokenizedPairs
from shapo.training.preference import train_preferences
from shapo_kernels.interop.torch_private import in_backward

pytest.importorskip("transformers")
from tests.support.trainers import ShaPOTrainer, arguments, rows

UPPER = sk.Subspace({"model.layers.1.mlp.down_proj.weight": [1, 5, 40]})


def counted(model):
    """Rows of each pass through the lower and the upper of two blocks; what checkpoints compute again is left out."""
    seen = {0: [], 1: []}
    for number, block in enumerate(model.model.layers):
        forward = block.mlp.forward

        def count(x, number=number, forward=forward):
            if torch.is_grad_enabled() and not in_backward():
                seen[number].append(len(x))
            return forward(x)

        block.mlp.forward = count
    return seen


def assert_near(model, other, *, exact):
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if exact:
            assert torch.equal(mine, theirs), name
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "loop", "loss", "lower", "upper"),
    [
        ({}, {}, {}, [12], [12, 12]),
        ({}, {"micro_batch_size": 2}, {}, [4, 4, 4], [4] * 6),
        ({"per_micro_batch": True}, {"micro_batch_size": 3}, {}, [6, 6], [6] * 4),
        ({"ascent_pairs": 1}, {}, {}, [12], [2, 12]),
        ({"ascent_pairs": 3}, {"micro_batch_size": 2}, {}, [4, 4, 4], None),
        ({"ascent_pairs": 3}, {"micro_batch_size": 2}, {"aggregation": "drdpo"}, [4, 4, 4], None),
        ({"ascent": "grad"}, {"dropout": True}, {}, [12], [12, 12]),
        ({}, {"bf16": True, "fused_head": "on"}, {}, [12], [12, 12]),
    ],
    ids=str,
)
def test_the_commands_loop(options, loop, loss, lower, upper, tiny_llama, synthetic_rows, tiny_encoder, tmp_path):
    pairs = TokenizedPairs(load_pairs(synthetic_rows["train"][:12]), tiny_encoder)
    if loop.get("dropout"):
        tiny_llama.model.layers[1].self_attn.attention_dropout = 0.5
        tiny_llama.model.layers[0].self_attn.attention_dropout = 0.5
    results, seen = [], None
    for reuse in (False, True):
        model = copy.deepcopy(tiny_llama)
        if reuse:
            seen = counted(model)
        train_preferences(
            model,
            pairs,
            loss=LossConfig(**loss),
            loop=LoopConfig(**{"updates": 1, "batch_size": 6, "lr": 1e-3, "warmup": 0, **loop}),
            shapo=ShaPOConfig(rho=0.1, reuse_prefix=reuse, **options),
            subspace=UPPER,
            output=tmp_path / str(reuse),
            progress=False,
        )
        results.append(model)
    # A part of a micro-batch is padded as the whole of it is, which rounds otherwise.
    assert_near(*results, exact="ascent_pairs" not in options)
    assert seen[0] == lower
    assert upper is None or seen[1] == upper


@pytest.mark.parametrize(
    ("shapo", "lower", "upper"),
    [
        ({}, [2, 2], [2] * 4),
        ({"per_micro_batch": True}, [2, 2], [2] * 4),
        ({"ascent_pairs": 1}, [2, 2], [1, 2, 2]),
        ({"ascent_fraction": 0.75}, [2, 2], None),
    ],
    ids=str,
)
def test_transformers_trainer_by_the_mixin(shapo, lower, upper, tiny_llama, tmp_path):
    results, seen = [], None
    for reuse in (False, True):
        model = copy.deepcopy(tiny_llama)
        if reuse:
            seen = counted(model)
        options = ShaPOArguments(UPPER, rho=0.5, reuse_prefix=reuse, **shapo)
        trainer = ShaPOTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(), shapo=options)
        trainer.train()
        results.append(model)
    assert_near(*results, exact="ascent_fraction" not in shapo and "ascent_pairs" not in shapo)
    assert seen[0] == lower
    assert upper is None or seen[1] == upper


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_transformers_trainer_over_several_updates(options, tiny_llama, tmp_path):
    results = []
    for reuse in (False, "model.layers"):
        model = copy.deepcopy(tiny_llama)
        shapo = ShaPOArguments(UPPER, rho=0.5, interval=2, reuse_prefix=reuse)
        trainer = ShaPOTrainer(model, arguments(tmp_path, max_steps=4, **options), train_dataset=rows(), shapo=shapo)
        trainer.train()
        results.append(model)
        assert trainer._shapo_optimizer().stats.get("prefix_blocks", 1) == 1
    assert_near(*results, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_trls_dpo_trainer_with_chosen_and_rejected_in_one_forward_pass(adapter, tiny_llama, tiny_tokenizer, tmp_path):
    trl, datasets, peft = (pytest.importorskip(name) for name in ("trl", "datasets", "peft"))
    from shapo.integrations import ShaPOTrainerMixin

    class ShaPODPOTrainer(ShaPOTrainerMixin, trl.DPOTrainer):
        pass

    data = datasets.Dataset.from_list(
        [{"prompt": f"q {i}", "chosen": f" a kind answer {i}", "rejected": f" a rude one {i}"} for i in range(8)]
    )
    results = []
    for reuse in (False, True):
        torch.manual_seed(0)
        trainer = ShaPODPOTrainer(
            copy.deepcopy(tiny_llama),
            args=trl.DPOConfig(
                str(tmp_path),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=2,
                learning_rate=1e-2,
                report_to=[],
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                disable_tqdm=True,
                max_length=64,
                precompute_ref_log_probs=not adapter,
            ),
            train_dataset=data,
            processing_class=copy.deepcopy(tiny_tokenizer),
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]) if adapter else None,
            shapo=ShaPOArguments(UPPER, rho=0.5, reuse_prefix=reuse),
        )
        seen = counted(trainer.model.base_model.model if adapter else trainer.model) if reuse else None
        trainer.train()
        results.append(trainer.model)
    assert_near(*results, exact=True)
    # Two micro-batches for each of two updates; a reference's passes run without gradients.
    assert len(seen[0]) == 4
    assert len(seen[1]) == 8


def test_activations_that_are_offloaded_are_refused(tiny_llama, tmp_path):
    options = arguments(tmp_path)
    options.activation_offloading = True
    with pytest.raises(ValueError, match=r"^activation_offloading[^\n]*reuse_prefix[^\n]*$"):
        ShaPOTrainer(tiny_llama, options, train_dataset=rows(), shapo=ShaPOArguments(UPPER, rho=0.5, reuse_prefix=True))
