"""Verdict files counted: benchmarks and categories apart, over-refusal beside them, judges and models compared."""

from __future__ import annotations

import json

import pytest

from shapo.errors import UserError
from shapo.safety import NOT_MEASURED, safety_summary
from shapo.statistics import wilson


@pytest.fixture
def verdicts(tmp_path):
    """Writes a verdict file from labels (and refusals) and returns its path."""

    def write(name, labels, *, judge="j", refusals=None, categories=None, first=0):
        rows = [
            {
                "id": f"p{first + n}",
                "judge": judge,
                "verdict": label,
                "category": (categories or ["c"] * len(labels))[n],
            }
            | ({"refusal": refusals[n]} if refusals else {})
            for n, label in enumerate(labels)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


def test_benchmarks_and_categories_are_counted_apart(verdicts):
    a = verdicts("harmbench.jsonl", ["unsafe", "safe", "unreadable"], categories=["x", "x", "y"])
    b = verdicts("mine.jsonl", ["safe"])
    found = safety_summary([a, b])["attack_success"]
    assert (found["harmbench"]["low"], found["harmbench"]["high"]) == (1 / 3, 2 / 3)
    assert found["harmbench"]["interval_high"] == wilson(2, 3).high
    assert found["harmbench"]["by_category"]["y"]["unreadable"] == 1
    assert (found["mine"]["low"], found["mine"]["judge"]) == (0.0, "j")


def test_over_refusal_is_shown_beside_attack_success_or_named_as_missing(verdicts):
    a = verdicts("a.jsonl", ["unsafe"])
    assert safety_summary([a])["over_refusal"] == NOT_MEASURED
    benign = verdicts("b.jsonl", ["safe"] * 4, refusals=[True, False, False, None])
    found = safety_summary([a], benign=benign)["over_refusal"]
    assert (found["low"], found["high"], found["unreadable"]) == (0.25, 0.5, 1)


def test_a_judge_that_does_not_know_refusals_cannot_measure_over_refusal(verdicts):
    with pytest.raises(UserError, match="does not say whether an answer refuses"):
        safety_summary([], benign=verdicts("b.jsonl", ["safe"]))


def test_benign_answers_that_are_all_unreadable_leave_the_share_open(verdicts):
    found = safety_summary([], benign=verdicts("b.jsonl", ["unreadable"] * 3, refusals=[None] * 3))["over_refusal"]
    assert (found["low"], found["high"], found["unreadable"]) == (0, 1, 3)


def test_two_judges_are_compared_on_the_same_answers_in_any_order(verdicts, tmp_path):
    a = verdicts("a.jsonl", ["unsafe", "safe", "unsafe", "safe"])
    b = verdicts("b.jsonl", ["unsafe", "safe", "safe", "unreadable"], judge="k")
    lines = b.read_text().splitlines(keepends=True)
    b.write_text("".join(lines[::-1]))
    found = safety_summary([a], second_judge=b)["agreement"]
    # Three answers: both unsafe, both safe, unsafe against safe. p_o = 2/3, p_e = (2*1 + 1*2)/9 = 4/9.
    assert found["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert (found["n"], found["left_out"], found["judges"]) == (3, 1, ["j", "k"])


def test_two_models_are_compared_on_the_same_prompts(verdicts):
    mine = verdicts("mine.jsonl", ["safe"] * 6 + ["unsafe"] * 2)
    theirs = verdicts("theirs.jsonl", ["unsafe"] * 8)
    found = safety_summary([mine], against=theirs)["difference"]
    assert found["difference"] == -0.75
    assert (found["only_first"], found["only_second"]) == (6, 0)
    assert found["p_value"] == pytest.approx(2 / 64)


@pytest.mark.parametrize(("judge", "first", "message"), [("j", 1, "other ids"), ("k", 0, "compare one judge's")])
def test_files_that_do_not_belong_together_are_refused(judge, first, message, verdicts):
    a = verdicts("a.jsonl", ["safe"])
    with pytest.raises(UserError, match=message):
        safety_summary([a], against=verdicts("b.jsonl", ["safe"], judge=judge, first=first))


def test_two_benchmarks_of_one_name_are_refused(verdicts, tmp_path):
    a = verdicts("a.jsonl", ["safe"])
    (tmp_path / "other").mkdir()
    b = tmp_path / "other" / "a.jsonl"
    b.write_text(a.read_text())
    with pytest.raises(UserError, match="same name"):
        safety_summary([a, b])


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        ("prompt_digest", "about other prompts than the first of --verdicts"),
        ("judge_digest", "another j than --verdicts"),
    ],
)
def test_models_are_compared_on_the_same_prompts_by_the_same_judge(digest, message, verdicts):
    first, second = (verdicts(f"{name}.jsonl", ["safe", "unsafe"]) for name in "ab")
    assert safety_summary([first], against=second)["difference"]["difference"] == 0
    for path, value in ((first, "1"), (second, "2")):
        rows = [json.loads(line) | {digest: value} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        safety_summary([first], against=second)


def test_two_judges_are_compared_on_the_same_answers_not_on_the_same_prompts(verdicts):
    first, second = verdicts("a.jsonl", ["safe"], judge="j"), verdicts("b.jsonl", ["safe"], judge="k")
    for path, value in ((first, "1"), (second, "2")):
        row = json.loads(path.read_text()) | {"answer_digest": value, "judge_digest": value, "prompt_digest": "same"}
        path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="about other answers"):
        safety_summary([first], second_judge=second)
