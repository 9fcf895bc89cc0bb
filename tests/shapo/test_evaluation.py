"""Accuracy with its interval, memorised flips, answers that depend on their prompt alone, and a judge's verdicts
bounded.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from shapo.data.pairs import EvaluationPrompt, PreferencePair
from shapo.errors import UserError
from shapo.evaluation import (
    attack_success,
    flips_fitted,
    generate_answers,
    log_ratios,
    preference_metrics,
    wilson,
    win_rate,
)
from shapo.scoring.logps import PairLogps
from shapo.storage.files import json_line


def logps(chosen, rejected, chosen_tokens=None, rejected_tokens=None):
    ones = [1] * len(chosen)
    return PairLogps(
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.tensor(chosen_tokens or ones),
        torch.tensor(rejected_tokens or ones),
    )


PAIRS = [PreferencePair("p", "a", "b", category=name) for name in ("x", "x", "y", "y")]
POLICY = logps([-1.0, -4.0, -2.0, -3.0], [-3.0, -2.0, -2.0, -9.0])
REFERENCE = logps([-2.0, -3.0, -2.0, -5.0], [-2.0, -3.0, -2.0, -5.0])


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (the score interval without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    share = wilson(successes, n)
    assert share.value == successes / n
    assert share.low == pytest.approx(low, abs=5e-5)
    assert share.high == pytest.approx(high, abs=5e-5)


def test_no_cases_give_no_share_and_the_whole_interval():
    share = wilson(0, 0)
    assert math.isnan(share.value)
    assert (share.low, share.high) == (0.0, 1.0)


def test_accuracy_loss_and_margin_follow_their_definitions():
    metrics = preference_metrics(POLICY, REFERENCE, PAIRS, beta=0.5)
    h = [2.0, -2.0, 0.0, 6.0]
    assert metrics["accuracy"]["value"] == 2.5 / 4  # a tie is half
    assert metrics["ties"] == 1
    assert metrics["loss"] == pytest.approx(sum(math.log1p(math.exp(-0.5 * value)) for value in h) / 4)
    assert metrics["margin"] == pytest.approx(0.5 * sum(h) / 4)
    assert metrics["by_category"]["x"]["accuracy"]["value"] == 0.5
    assert metrics["by_category"]["y"]["accuracy"]["value"] == 0.75


def test_without_a_reference_means_per_token_are_compared():
    policy = logps([-4.0], [-6.0], [2], [6])
    assert log_ratios(policy, None).tolist() == [-2.0 + 1.0]


def test_flips_fitted_looks_at_flipped_pairs_alone():
    flipped = torch.tensor([True, True, False, False])
    assert flips_fitted(POLICY, REFERENCE, flipped).value == 0.5
    assert flips_fitted(POLICY, REFERENCE, flipped).n == 2


PROMPTS = [EvaluationPrompt(f"\n\nHuman: question {n}\n\nAssistant:", "c", f"id-{n}") for n in range(3)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_depends_on_its_prompt_and_the_seed_alone(temperature, tiny_llama, tiny_encoder, tmp_path):
    def answers(prompts, name, seed=0):
        path = tmp_path / f"{name}.jsonl"
        generate_answers(
            tiny_llama, tiny_encoder, prompts, path,
            seed=seed, temperature=temperature, max_new_tokens=8, progress=False,
        )  # fmt: skip
        return [json.loads(line) for line in path.read_text().splitlines()]

    whole = answers(PROMPTS, "whole")
    assert [row["id"] for row in whole] == ["id-0", "id-1", "id-2"]
    torch.manual_seed(99)
    assert answers(PROMPTS[::-1], "reversed")[::-1] == whole
    assert answers(PROMPTS[1:2], "one") == whole[1:2]
    if temperature:
        assert answers(PROMPTS, "other", seed=1) != whole


def test_generation_leaves_the_random_state_alone(tiny_llama, tiny_encoder, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate_answers(
        tiny_llama, tiny_encoder, PROMPTS, tmp_path / "a.jsonl", temperature=1.0, max_new_tokens=4, progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_that_share_an_id_are_refused(tiny_llama, tiny_encoder, tmp_path):
    with pytest.raises(UserError, match="same id"):
        generate_answers(tiny_llama, tiny_encoder, [PROMPTS[0]] * 2, tmp_path / "a.jsonl", progress=False)
    assert not list(tmp_path.iterdir())


def test_line_separators_of_unicode_inside_an_answer_end_no_line_of_the_verdicts(tmp_path):
    from shapo.cli import main

    answers = ["a\u2028b", "c\u2029d\x85e\x0b", "f"]
    rows = [json_line({"answer": text, "verdict": "safe"}) for text in answers]
    (tmp_path / "v.jsonl").write_text("".join(rows), encoding="utf-8")
    assert main(["evaluate", "--verdicts", str(tmp_path / "v.jsonl"), "--output", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["attack_success"]["safe"] == 3


def test_attack_success_is_bounded_by_what_unparsed_verdicts_may_be():
    success = attack_success(["unsafe", " UNSAFE ", "safe", "safe", "safe", "I cannot say", None, "safe"])
    assert (success.n, success.unsafe, success.safe, success.unparsed) == (8, 2, 4, 2)
    assert (success.low, success.high) == (0.25, 0.5)
    assert success.interval_low == wilson(2, 8).low
    assert success.interval_high == wilson(4, 8).high


def test_no_verdicts_are_an_error():
    with pytest.raises(UserError, match="no verdicts"):
        attack_success([])


def test_a_judge_that_goes_by_the_position_gives_even_odds():
    assert win_rate([("a", "b"), ("b", "a")])["value"] == 0.5


def test_a_win_needs_both_orders():
    wins = win_rate([("a", "a"), ("a", "tie"), ("b", "b"), ("tie", "tie"), ("?", "a")])
    assert wins["value"] == (1 + 0.5 + 0 + 0.5) / 4
    assert (wins["n"], wins["unparsed"], wins["orders_agree"]) == (4, 1, 3)
