"""At the reward level the reference model and the reward model answer once for each response of a batch, however many
passes an update takes (T1): in the command's loop, and in a Trainer that asks them as it fetches its batches.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import shapo_kernels as sk
from shapo.cli import main
from shapo.integrations import ShaPOArguments, ShaPOTrainerMixin
from shapo.training.metrics import read_metrics
from shapo_kernels import losses

transformers = pytest.importorskip("transformers")
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

DOWN = "model.layers.0.mlp.down_proj.weight"
NEURONS = sk.Subspace({DOWN: [1, 2, 30]})


def count_rows(model: torch.nn.Module) -> list[int]:
    """The rows of each forward pass that a model takes without gradients, from now on."""
    asked: list[int] = []
    model.register_forward_hook(
        lambda module, args, output: None if torch.is_grad_enabled() else asked.append(len(output.logits))
    )
    return asked


def test_a_run_of_the_command_asks_each_model_once_for_each_response(
    reward_model, tiny_llama, tiny_tokenizer, synthetic_rows, tmp_path, monkeypatch
):
    for name, model in (("policy", tiny_llama), ("reward", reward_model)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows["train"]))
    NEURONS.save(tmp_path / "subspace.safetensors")
    asked: dict[tuple[str, bool], list[int]] = {}

    def counted(kind: type) -> None:
        forward = kind.forward

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            rows = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            asked.setdefault((kind.__name__, torch.is_grad_enabled()), []).append(len(rows))
            return output

        monkeypatch.setattr(kind, "forward", counting)

    counted(LlamaForCausalLM)
    counted(LlamaForSequenceClassification)
    updates, batch = 9, 4  # three epochs: every pair comes three times
    options = {
        "--model": tmp_path / "policy",
        "--data": tmp_path / "train.jsonl",
        "--limit": 12,
        "--output": tmp_path / "out",
        "--max-length": 96,
        "--max-prompt-length": 64,
        "--updates": updates,
        "--batch-size": batch,
        "--micro-batch-size": 2,
        "--loss": "reward_level",
        "--reward-model": tmp_path / "reward",
        "--subspace": tmp_path / "subspace.safetensors",
        "--rho": 0.1,
        "--interval": 2,
        "--fused-head": "off",  # which would take forward passes past the class's own
    }
    assert main(["train", "--quiet", *(str(part) for option in options.items() for part in option)]) == 0
    shapo_updates = sum("shapo" in line for line in read_metrics(tmp_path / "out" / "metrics.jsonl", "update"))
    assert shapo_updates == updates // 2
    assert sum(asked.pop(("LlamaForSequenceClassification", False))) == 2 * 12
    # And the trained model for one micro-batch, before it is saved.
    assert sum(asked.pop(("LlamaForCausalLM", False))) == 2 * 12 + 2 * 2
    assert sum(asked.pop(("LlamaForCausalLM", True))) == 2 * batch * (updates + shapo_updates)
    assert not asked


class RewardLevelTrainer(ShaPOTrainerMixin, Trainer):
    """DPO with a reward model's labels; batches hold chosen and rejected responses, `tokens [B, 2, T]`."""

    reference: Any = None
    reward: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches if self.reward is not None else ():
            batch |= answers(self.reference, self.reward, batch["tokens"])
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return losses.reward_level(
            *logps(model, inputs["tokens"]).unbind(1),
            *inputs["reference_logps"].unbind(1),
            beta=0.1,
            reward_chosen=inputs["rewards"][:, 0],
            reward_rejected=inputs["rewards"][:, 1],
            beta_reward=1.0,
        ).mean()


def logps(model: Any, tokens: Tensor) -> Tensor:
    rows = tokens.flatten(0, 1)
    return losses.sequence_logps(model(input_ids=rows).logits, rows)[0].view(-1, 2)


def answers(reference: Any, reward: Any, tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        scores = reward(input_ids=tokens.flatten(0, 1)).logits.view(-1, 2)
        return {"reference_logps": logps(reference, tokens), "rewards": scores}


def rows() -> list[dict[str, Tensor]]:
    return [{"tokens": tokens} for tokens in torch.randint(5, 300, (16, 2, 12), generator=torch.manual_seed(0))]


@pytest.mark.parametrize(
    "options", [{}, {"interval": 2}, {"per_micro_batch": True}, {"ascent_fraction": 0.25}], ids=str
)
def test_a_trainer_that_asks_as_it_fetches_asks_once_and_trains_as_with_answers_known_beforehand(
    reward_model, tiny_llama, tmp_path, options
):
    reference, before = copy.deepcopy(tiny_llama).eval(), copy.deepcopy(tiny_llama)
    reward_model.eval()
    known = [
        {name: value[0] for name, value in answers(reference, reward_model, row["tokens"][None]).items()}
        for row in rows()
    ]
    asked = [count_rows(reference), count_rows(reward_model)]

    def train(model: Any, data: list[dict[str, Tensor]], **models: Any) -> None:
        trainer = RewardLevelTrainer(
            model,
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=3,
                learning_rate=0.1,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=data,
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
            shapo=ShaPOArguments(NEURONS, rho=0.5, **options),
        )
        trainer.reference, trainer.reward = models.get("reference"), models.get("reward")
        trainer.train()

    other = copy.deepcopy(tiny_llama)
    train(tiny_llama, rows(), reference=reference, reward=reward_model)
    assert asked == [[4] * 6, [4] * 6]  # three updates of two micro-batches of two pairs
    train(other, [row | told for row, told in zip(rows(), known, strict=True)])
    assert asked == [[4] * 6, [4] * 6]
    assert not torch.equal(tiny_llama.get_parameter(DOWN), before.get_parameter(DOWN))
    for a, b in zip(tiny_llama.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
