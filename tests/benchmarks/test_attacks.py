"""Rows of attacks: models are compared prompt by prompt, and no text of an answer gets into them."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attacks
from shapo.probe import Probe
from shapo.statistics import wilson
from tests.support import runs

SECRET = "SECRET answer"


def verdicts(folder, seed, unsafe, refused):
    """Verdict files of step 5, as `shapo attack` leaves them."""
    (folder / f"seed-{seed}").mkdir()
    for name, key, values in (("verdicts", "verdict", unsafe), ("benign", "refusal", refused)):
        lines = [{"id": n, key: value, "judge": "probe", "raw": SECRET} for n, value in enumerate(values)]
        (folder / f"seed-{seed}" / f"{name}-5.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


U, S = "unsafe", "safe"


@pytest.fixture
def pair(tmp_path):
    """Two models, two seeds: DPO's answers to 6 of 8 prompts are unsafe, ShaPO's to 1 and to 5 of them."""
    made = [runs.attack(tmp_path / name) for name in ("dpo", "shapo")]
    for seed in (0, 1):
        verdicts(made[0], seed, [U] * 6 + [S] * 2, [False] * 4)
        verdicts(made[1], seed, [U] * (1 + 4 * seed) + [S] * (7 - 4 * seed), [True] + [False] * 3)
    found = []
    for folder in made:
        values = json.loads((folder / "attack.json").read_text())
        for seed in values["seeds"]:
            seed["curve"] = seed["curve"][1:]
            seed["curve"][0]["over_refusal"] = runs.bounded(0.25)
        found.append(attacks.Attack(folder.name, folder, values))
    return found


def test_shares_are_means_over_seeds_with_both_intervals(pair):
    success, refusal = attacks.means(pair[1])
    assert (success["what"], success["value"], success["seeds"], success["n"]) == ("attack_success", 3 / 8, 2, 8)
    assert 0 <= success["low"] < 3 / 8 < success["high"] <= 1
    # Drawing seeds too can only add spread: the seeds differ by half of the prompts.
    assert success["wide_high"] - success["wide_low"] > success["high"] - success["low"]
    assert (refusal["what"], refusal["value"], refusal["n"]) == ("over_refusal", 1 / 4, 4)


def test_models_are_compared_prompt_by_prompt_and_seed_by_seed(pair):
    success, refusal = attacks.differences(*pair)
    assert (success["model"], success["against"], success["value"]) == ("shapo", "dpo", -(5 / 8 + 1 / 8) / 2)
    assert (success["lower"], success["higher"], success["seeds"]) == (2, 0, 2)
    assert (refusal["what"], refusal["value"], refusal["lower"], refusal["higher"]) == ("over_refusal", 1 / 4, 0, 2)


def test_a_prompt_that_one_seed_cannot_read_is_left_out_of_all(pair):
    path = pair[1].folder / "seed-1" / "verdicts-5.jsonl"
    path.write_text(path.read_text().replace(f'"{S}"', '"?"', 1))
    changed, *_ = attacks.means(pair[1])
    # The sixth prompt, safe in both seeds: 1 and 5 unsafe ones of the other seven.
    assert (changed["n"], changed["left_out"], changed["value"]) == (7, 1, pytest.approx(6 / 14))
    assert attacks.differences(*pair)[0]["n"] == 7


def test_the_judges_row_is_its_accuracy_on_what_was_held_out(tmp_path):
    made = {"metadata": {"validation_examples": "40"}, "accuracy": 0.9, "majority": 0.5}
    Probe(torch.zeros(2, 4), torch.zeros(2), balanced_accuracy=0.9, epoch=1, **made).save(tmp_path / "p.safetensors")
    row = attacks.validated(str(tmp_path / "p.safetensors"))
    assert (row["n"], row["right"]["value"], row["majority"]) == (40, 36 / 40, 0.5)
    assert row["right"]["low"] == wilson(36, 40).low
    assert "| held-out answers | 40 | 50.0 % | 90.0 % (" in attacks.tables([row])


def test_the_table_has_numbers_and_no_text(pair):
    found = [row for attack in pair for row in (*attack.points(), *attacks.means(attack))]
    found += attacks.differences(*pair)
    text = attacks.tables(found)
    assert "| dpo | 5 | 2 | 75 (" in text
    assert "| 50 | 0 (0 to 0; 0 to 0) | 3.00 |" in text
    assert "| shapo, dpo | 5 | attack success | -38 (" in text
    assert "| 2, 0 of 2 |" in text
    assert SECRET not in json.dumps(found)
