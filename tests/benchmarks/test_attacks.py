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


def verdicts(folder, unsafe, refused):
    """Verdict files of step 5, as `shapo attack` leaves them."""
    (folder / "seed-0").mkdir()
    for name, key, values in (("verdicts", "verdict", unsafe), ("benign", "refusal", refused)):
        lines = [{"id": n, key: value, "judge": "probe", "raw": SECRET} for n, value in enumerate(values)]
        (folder / "seed-0" / f"{name}-5.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folders(tmp_path):
    made = [runs.attack(tmp_path / name) for name in ("dpo", "shapo")]
    verdicts(made[0], ["unsafe"] * 6 + ["safe"] * 2, [False] * 4)
    verdicts(made[1], ["unsafe"] + ["safe"] * 7, [True] + [False] * 3)
    for folder in made:
        values = json.loads((folder / "attack.json").read_text())
        values["seeds"] = values["seeds"][:1]
        values["seeds"][0]["curve"] = values["seeds"][0]["curve"][1:]
        values["seeds"][0]["curve"][0]["over_refusal"] = runs.bounded(0.25)
        runs.write(folder / "attack.json", values)
    return made


def test_models_are_compared_prompt_by_prompt(folders):
    read = [json.loads((folder / "attack.json").read_text()) for folder in folders]
    success, refusal = attacks.differences("dpo", ["dpo", "shapo"], folders, read)
    # Five prompts of eight are unsafe for DPO alone: 2 / 2^5 for McNemar's exact test.
    assert (success["model"], success["against"], success["difference"]) == ("shapo", "dpo", -5 / 8)
    assert (success["only_first"], success["only_second"], success["p_value"]) == (5, 0, 2 / 2**5)
    assert (refusal["what"], refusal["difference"], refusal["n"]) == ("over_refusal", 1 / 4, 4)


def test_the_judges_row_is_its_accuracy_on_what_was_held_out(tmp_path):
    made = {"metadata": {"validation_examples": "40"}, "accuracy": 0.9, "majority": 0.5}
    Probe(torch.zeros(2, 4), torch.zeros(2), balanced_accuracy=0.9, epoch=1, **made).save(tmp_path / "p.safetensors")
    row = attacks.validated(str(tmp_path / "p.safetensors"))
    assert (row["n"], row["right"]["value"], row["majority"]) == (40, 36 / 40, 0.5)
    assert row["right"]["low"] == wilson(36, 40).low
    assert "| held-out answers | 40 | 50.0 % | 90.0 % (" in attacks.tables([row])


def test_the_table_has_numbers_and_no_text(folders):
    read = [json.loads((folder / "attack.json").read_text()) for folder in folders]
    found = [row for name, attack in zip(("dpo", "shapo"), read, strict=True) for row in attacks.points(name, attack)]
    found += attacks.differences("dpo", ["dpo", "shapo"], folders, read)
    text = attacks.tables(found)
    assert "| dpo | 5 | 75 (38 to 88) | 50 | 25 (12 to 62) | 3.00 |" in text
    assert "| shapo, dpo | 5 | attack success | -62 (" in text
    assert "0 and 5 of 8 | 0.062 |" in text
    assert SECRET not in json.dumps(found)
