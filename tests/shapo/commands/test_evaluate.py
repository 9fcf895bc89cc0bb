"""`shapo evaluate`: bad input in one line, and verdicts that need no model."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--data", "x.jsonl"], "need a model"),
        (["--model", "m", "--prompts", "x.jsonl"], "--prompts has no effect without --answers"),
        (["--model", "m", "--prompts", "x.jsonl", "--answers", "./e.json"], "name the same file"),
        (
            ["--model", "m", "--verdicts", "{files}/verdicts.jsonl"],
            "--model has no effect without --data or --prompts or --lm-eval",
        ),
        (["--reference", "m", "--verdicts", "{files}/verdicts.jsonl"], "--reference has no effect without --data"),
        (["--verdicts", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--verdicts", "{files}/columns.jsonl"], "line 1: expected a JSON object with verdict"),
        (["--verdicts", "{files}/empty.jsonl"], "is empty"),
        (["--verdicts", "{files}/verdicts.jsonl", "--output", "."], "cannot be replaced whole; give it a name"),
    ],
)
def test_bad_input_of_evaluate_is_one_line(arguments, message, shapo, files, tmp_path):
    arguments = [part.replace("{files}", str(files)) for part in arguments]
    code, _, error = shapo("evaluate", "--output", "e.json", *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_judges_verdicts_are_counted_without_a_model(shapo, tmp_path):
    (tmp_path / "v.jsonl").write_text('{"verdict": "unsafe"}\n{"verdict": "safe"}\n{"verdict": ""}\n')
    (tmp_path / "c.jsonl").write_text('{"first": "a", "second": "a"}\n')
    code, out, _ = shapo("evaluate", "--verdicts", "v.jsonl", "--comparisons", "c.jsonl", "--output", "e.json")
    assert code == 0
    assert "attack success, v, by unnamed: 33.3 to 66.7 % (1 of 3 unreadable" in out
    assert "over-refusal: not measured" in out
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["attack_success"]["v"]["unreadable"] == 1
    assert result["win_rate"]["value"] == 1.0
