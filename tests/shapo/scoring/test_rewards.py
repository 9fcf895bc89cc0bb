"""The reward model is asked in its own words, once, and a cost is turned round."""

from __future__ import annotations

import pytest
import torch

from shapo.data.formats import load_pairs
from shapo.errors import UserError
from shapo.scoring.rewards import PairRewards, RewardScorer, load_reward_scorer, train_reward_model


@pytest.fixture
def plain_tokenizer(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def pairs(synthetic_rows):
    return load_pairs(synthetic_rows["train"]).pairs


def test_a_cost_enters_negated(reward_model, tiny_tokenizer, pairs):
    reward = RewardScorer(reward_model, tiny_tokenizer, sign="reward").score_pairs(pairs[:6], progress=False)
    cost = RewardScorer(reward_model, tiny_tokenizer, sign="cost").score_pairs(pairs[:6], progress=False)
    assert torch.equal(cost.chosen, -reward.chosen)
    assert torch.equal(cost.rejected, -reward.rejected)


def test_a_score_is_the_models_own_for_that_text_alone(reward_model, plain_tokenizer, pairs):
    scorer = RewardScorer(reward_model.eval(), plain_tokenizer, batch_size=4)
    scores = scorer.score([pair.prompt for pair in pairs[:9]], [pair.chosen for pair in pairs[:9]], progress=False)
    for pair, score in zip(pairs, scores, strict=False):
        ids = plain_tokenizer(pair.prompt + pair.chosen, return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, torch.tensor([[plain_tokenizer.eos_token_id]])], dim=1)
        with torch.no_grad():
            assert score.item() == pytest.approx(reward_model(input_ids=ids).logits.item(), abs=1e-5)


def test_the_reward_models_chat_template_is_used_where_it_has_one(reward_model, plain_tokenizer, pairs):
    plain_tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    scorer = RewardScorer(reward_model, plain_tokenizer)
    question = pairs[0].prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
    text = f"<user>{question}</s>\n<assistant>{pairs[0].chosen.strip()}</s>\n"
    assert (
        scorer.encode(pairs[0].prompt, pairs[0].chosen) == plain_tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def test_long_texts_keep_bos_and_the_response_and_are_counted(reward_model, plain_tokenizer, pairs):
    scorer = RewardScorer(reward_model, plain_tokenizer, max_length=5)
    whole = RewardScorer(reward_model, plain_tokenizer).encode(pairs[0].prompt, pairs[0].chosen)
    bos = [plain_tokenizer.bos_token_id] if whole[0] == plain_tokenizer.bos_token_id else []
    assert scorer.encode(pairs[0].prompt, pairs[0].chosen) == [*bos, *whole[len(whole) - 5 + len(bos) :]]
    with pytest.warns(UserWarning, match="4 of 4 texts have more than the 5 tokens") as warned:
        scorer.score_pairs(pairs[:2], progress=False)
    assert warned[0].filename == __file__


def test_under_a_chat_template_the_header_stays_and_the_oldest_exchange_goes_first(reward_model, plain_tokenizer):
    plain_tokenizer.chat_template = (
        "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def ids(text):
        return plain_tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = "\n\nHuman: what is old\n\nAssistant: this\n\nHuman: what is new\n\nAssistant:"
    without_the_oldest = ids("<s><user>what is new</s><assistant>an answer</s>")
    scorer = RewardScorer(reward_model, plain_tokenizer, max_length=len(without_the_oldest))
    assert scorer.encode(prompt, "an answer") == without_the_oldest
    shorter = RewardScorer(reward_model, plain_tokenizer, max_length=len(without_the_oldest) - 2)
    header = ids("<s><user>")
    kept = shorter.encode(prompt, "an answer")
    assert kept[: len(header)] == header
    assert kept[len(header) :] == without_the_oldest[len(header) + 2 :]
    with pytest.warns(UserWarning, match="2 of 2 texts"):
        shorter.encode_all([prompt, prompt], ["an answer", "an answer"])


def test_cached_scores_are_not_asked_for_again_until_something_changes(reward_model, tiny_tokenizer, pairs, tmp_path):
    asked = []
    reward_model.register_forward_hook(lambda module, inputs, output: asked.append(len(output.logits)))
    scorer = RewardScorer(reward_model, tiny_tokenizer)
    path = tmp_path / "rewards.safetensors"
    first = scorer.cached_pairs(path, pairs[:5], progress=False)
    assert sum(asked) == 10
    again = scorer.cached_pairs(path, pairs[:5], progress=False)
    assert sum(asked) == 10
    assert torch.equal(first.chosen, again.chosen)
    assert first.digest() == again.digest()
    RewardScorer(reward_model, tiny_tokenizer, sign="cost").cached_pairs(path, pairs[:5], progress=False)
    assert sum(asked) == 20
    with torch.no_grad():
        reward_model.score.weight.add_(1.0)
    RewardScorer(reward_model, tiny_tokenizer, sign="cost").cached_pairs(path, pairs[:5], progress=False)
    assert sum(asked) == 30


def test_bradley_terry_learns_the_labels_it_is_given(reward_model, tiny_tokenizer, pairs):
    scorer = RewardScorer(reward_model, tiny_tokenizer)
    train_reward_model(scorer, pairs[:16], updates=60, lr=5e-3, progress=False)
    assert scorer.score_pairs(pairs[:16], progress=False).agreement() > 0.9


def test_agreement_counts_a_tie_as_half():
    assert PairRewards(torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 1.0])).agreement() == 0.375


def test_a_checkpoint_in_bf16_is_asked_in_fp32(reward_model, tiny_tokenizer, pairs, tmp_path):
    import copy

    halved = copy.deepcopy(reward_model).to(torch.bfloat16)
    halved.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    scorer = load_reward_scorer(str(tmp_path), sign="reward", device=torch.device("cpu"))
    exact = RewardScorer(halved.double(), tiny_tokenizer).score_pairs(pairs, progress=False)
    found = scorer.score_pairs(pairs, progress=False)
    torch.testing.assert_close(found.chosen - found.rejected, exact.chosen - exact.rejected, rtol=0, atol=1e-5)


def test_rewards_that_are_no_numbers_are_refused_by_the_pair(reward_model, tiny_tokenizer, pairs):
    with pytest.raises(UserError, match="the rewards of 1 of 3 pairs are NaN or infinite, first of pair 2"):
        PairRewards(torch.tensor([1.0, float("nan"), 2.0]), torch.zeros(3))
    with torch.no_grad():
        reward_model.score.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="of 4 pairs are NaN or infinite"):
        RewardScorer(reward_model, tiny_tokenizer).score_pairs(pairs[:4], progress=False)


def test_a_chat_template_that_refuses_a_conversation_gives_one_line(reward_model, plain_tokenizer, pairs):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if messages | length > 2 %}{{ raise_exception('no') }}"
        "{% endif %}"
    )
    scorer = RewardScorer(reward_model, plain_tokenizer)
    with pytest.raises(UserError, match="the chat template refuses a conversation: no"):
        scorer.encode("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d")


def test_a_model_with_several_labels_is_no_reward_model(reward_model, tiny_tokenizer):
    reward_model.config.num_labels = 2
    with pytest.raises(UserError, match="gives 2 scores"):
        RewardScorer(reward_model, tiny_tokenizer)


def test_a_tokenizer_without_padding_is_reported(reward_model, plain_tokenizer):
    reward_model.config.pad_token_id = plain_tokenizer.pad_token = None
    with pytest.raises(UserError, match="padding token"):
        RewardScorer(reward_model, plain_tokenizer)


def test_a_missing_reward_model_gives_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot load the reward model") as error:
        load_reward_scorer(str(tmp_path / "nothing"), sign="reward", device=torch.device("cpu"))
    assert "\n" not in str(error.value)
