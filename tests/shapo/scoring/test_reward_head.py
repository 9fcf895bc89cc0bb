"""The head of a reward model: fitted as the mathematics says, chosen on held-out prompts, asked as in training."""

import math

import pytest
import torch

from shapo.cli import main
from shapo.data.formats import load_pairs
from shapo.data.pairs import PreferencePair
from shapo.errors import UserError
from shapo.models.loading import save_model
from shapo.scoring.reward_head import (
    fit_reward_head,
    histogram,
    reward_model_of,
    saturated,
    sharpness_hint,
    soft_labels,
)
from shapo.scoring.rewards import PairRewards, RewardScorer, load_reward_scorer


@pytest.fixture
def pairs(synthetic_rows):
    return load_pairs(synthetic_rows["train"]).pairs


@pytest.fixture
def scorer(tiny_llama, tiny_tokenizer):
    return RewardScorer(reward_model_of(tiny_llama), tiny_tokenizer, batch_size=8)


def test_the_body_is_the_language_models(scorer, tiny_llama):
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        expected = tiny_llama.model(ids).last_hidden_state
        torch.testing.assert_close(scorer.model.model(ids).last_hidden_state, expected, rtol=0, atol=0)
        assert not scorer.model(ids).logits.any()


def test_the_fit_is_the_minimum_of_the_penalised_loss(scorer, pairs):
    fit = fit_reward_head(scorer, pairs, progress=False)
    rows = [[scorer.encode(p.prompt, text) for text in (p.chosen, p.rejected)] for p in pairs]
    with torch.no_grad():
        last = [[scorer.model.model(torch.tensor([ids])).last_hidden_state[0, -1].double() for ids in r] for r in rows]
    difference = torch.stack([chosen - rejected for chosen, rejected in last])
    scale = difference.square().mean().sqrt()
    w = (scorer.model.score.weight[0].detach().double() * scale).requires_grad_()
    loss = torch.nn.functional.softplus(-(difference / scale) @ w).mean() + 0.5 * fit.penalty * w.square().sum()
    (slope,) = torch.autograd.grad(loss, w)
    assert w.norm() > 0.1
    assert slope.norm() < 1e-3 * w.norm()


def test_scores_of_the_saved_model_are_those_of_the_fitted_one(scorer, pairs, tiny_tokenizer, tmp_path):
    fit_reward_head(scorer, pairs, progress=False)
    own = scorer.score_pairs(pairs[:6], progress=False)
    save_model(tmp_path / "rm", scorer.model, tiny_tokenizer)
    loaded = load_reward_scorer(str(tmp_path / "rm"), sign="reward", device=torch.device("cpu"))
    torch.testing.assert_close(loaded.score_pairs(pairs[:6], progress=False).chosen, own.chosen)


def test_random_labels_are_not_learned_on_held_out_prompts(scorer):
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = [
        PreferencePair(f"Question {i}?", f" {letters[i % 26]} yes", f" {letters[(7 * i) % 26]} no") for i in range(40)
    ]
    swapped = [PreferencePair(p.prompt, p.rejected, p.chosen) if i % 2 else p for i, p in enumerate(made)]
    fit = fit_reward_head(scorer, swapped, progress=False)
    assert abs(fit.accuracy - 0.5) < 3 * math.sqrt(0.25 / 40) + 0.05


def test_soft_labels_and_their_saturation():
    rewards = PairRewards(torch.tensor([1.0, 0.0, 3.0, 0.5]), torch.tensor([0.0, 1.0, 0.0, 0.5]))
    expected = [1 / (1 + math.exp(-2 * d)) for d in (1.0, -1.0, 3.0, 0.0)]
    assert soft_labels(rewards, 2.0).tolist() == pytest.approx(expected)
    assert [saturated(rewards, beta) for beta in (1.0, 2.0, 5.0)] == [0.0, 0.25, 0.75]
    median = PairRewards(torch.tensor([2.0, -2.0, 2.0]), torch.zeros(3))
    assert soft_labels(median, sharpness_hint(median)).tolist() == pytest.approx([0.9, 0.1, 0.9])


def test_the_histogram_counts_pairs_by_their_soft_label():
    differences = [math.log(q / (1 - q)) for q in (0.01, 0.04, 0.52, 0.99)]
    rewards = PairRewards(
        torch.tensor([*differences, 1000.0], dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    )
    assert histogram(rewards, 1.0) == [2, *[0] * 9, 1, *[0] * 8, 2]
    assert sum(histogram(rewards, 1e-9)[9:11]) == 5


def test_too_few_prompts_are_refused(scorer, pairs):
    with pytest.raises(UserError, match="at least 5 are needed"):
        fit_reward_head(scorer, pairs[:3], progress=False)


def test_the_command_makes_a_model_that_training_takes_and_training_warns_of_hard_labels(
    tiny_llama, tiny_tokenizer, synthetic_rows, tmp_path, capsys
):
    import json

    save_model(tmp_path / "model", tiny_llama, tiny_tokenizer)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows["train"]))
    base = ["--model", str(tmp_path / "model"), "--data", str(data), "--quiet", "--device", "cpu"]
    assert main(["reward", *base, "--output", str(tmp_path / "reward"), "--betas", "1,100"]) == 0
    found = json.loads((tmp_path / "reward" / "reward.json").read_text())
    assert found["saturated"]["1"] <= found["saturated"]["100"]
    assert (tmp_path / "reward" / "soft_labels.png").read_bytes().startswith(b"\x89PNG")
    train = ["train", *base, "--output", str(tmp_path / "run"), "--updates", "1", "--loss", "reward_level"]
    train += ["--reward-model", str(tmp_path / "reward" / "model"), "--limit", "8"]
    assert main([*train, "--beta-reward", "1e6"]) == 0
    assert "hardly softer than labels" in capsys.readouterr().err
    assert main([*train, "--beta-reward", "1e-3", "--overwrite"]) == 0
    assert "hardly softer" not in capsys.readouterr().err
