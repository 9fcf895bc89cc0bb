"""TRL's DPOTrainer as an independent implementation: model, masks, reference and loss, end to end."""

import copy

import pytest
import torch

from shapo_kernels import losses

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models():
    from tests.support.llamas import llama

    policy = llama(vocab_size=40, pad_token_id=0)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.eval(), reference.eval()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(40)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(4)

    def words(count):
        return " ".join(f"w{number}" for number in torch.randint(3, 40, (count,), generator=generator).tolist())

    lengths = [(3, 5, 2), (6, 1, 7), (2, 4, 4), (5, 8, 3)]
    return [{"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)} for p, c, r in lengths]


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "name", "numbers"),
    [
        ("sigmoid", 0.0, "dpo", {}),
        ("hinge", 0.0, "hinge", {}),
        ("ipo", 0.0, "ipo_mean", {}),
        ("robust", 0.2, "rdpo", {"epsilon": 0.2}),
    ],
)
def test_loss_and_rewards_equal_those_of_the_dpo_trainer(
    loss_type, label_smoothing, name, numbers, models, tokenizer, rows, tmp_path
):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = models
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        beta=0.3,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        policy, reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, dict(batch)).item()
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        halves = {}
        for key, model in (("policy", policy), ("ref", reference)):
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            sums, counts = losses.sequence_logps(output.logits, labels)
            halves[f"{key}_chosen"], halves[f"{key}_rejected"] = sums.chunk(2)
        halves["chosen_counts"], halves["rejected_counts"] = counts.chunk(2)
        ours = losses.PreferenceLoss(name, beta=0.3, **numbers)(losses.PreferenceBatch(**halves))
    assert ours.loss.item() == pytest.approx(theirs, rel=1e-5)
    if name != "ipo_mean":
        (margin,) = trainer._metrics["eval"]["rewards/margins"]
        assert ours.margin.mean().item() == pytest.approx(margin, rel=1e-4)


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_the_likelihood_term_equals_that_of_the_dpo_trainer(weight, models, tokenizer, rows, tmp_path):
    """What was rpo_alpha is now a second loss type with a weight."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = models
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, weight],
        beta=0.3,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        policy, reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def ours():
        halves = {}
        for key, model in (("policy", trainer.model), ("ref", reference)):
            with torch.set_grad_enabled(key == "policy"):
                output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            sums, counts = losses.sequence_logps(output.logits, labels)
            halves[f"{key}_chosen"], halves[f"{key}_rejected"] = sums.chunk(2)
        halves["chosen_counts"], halves["rejected_counts"] = counts.chunk(2)
        return losses.PreferenceLoss("dpo", beta=0.3, nll=weight)(losses.PreferenceBatch(**halves)).loss

    def gradient(loss):
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(trainer.model.parameters()))])

    theirs, mine = trainer.compute_loss(trainer.model, dict(batch)), ours()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(gradient(mine), gradient(theirs), rtol=1e-4, atol=1e-6)


def test_sequence_logps_sums_what_trl_selects():
    from trl.trainer.utils import selective_log_softmax

    logits, labels = torch.randn(3, 9, 50), torch.randint(0, 50, (3, 9))
    expected = selective_log_softmax(logits[:, :-1], labels[:, 1:]).sum(1)
    assert torch.allclose(losses.sequence_logps(logits, labels)[0], expected, rtol=1e-6)
