"""Schemas of published data sets: what becomes a pair, what is left out and why, and what is said of bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shapo.data.formats import load_pairs, load_prompts
from shapo.data.pairs import PreferencePair, parse_transcript, render_transcript
from shapo.errors import UserError

OLD_PKU = {
    "prompt": "May I?",
    "response_0": "Yes.",
    "response_1": "No.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}
NEW_PKU = OLD_PKU | {
    "prompt_source": "x",
    "response_0_harm_category": {"Privacy Violation": False, "Economic Crime": True},
    "response_1_harm_category": {"Privacy Violation": False, "Economic Crime": False},
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
}


def test_pku_takes_the_safer_response_and_keeps_the_flags() -> None:
    (pair,) = load_pairs([OLD_PKU])
    assert pair == PreferencePair(
        "\n\nHuman: May I?\n\nAssistant:", " No.", " Yes.", chosen_unsafe=False, rejected_unsafe=True
    )


def test_pku_can_take_the_better_response() -> None:
    (pair,) = load_pairs([OLD_PKU], preference="better")
    assert (pair.chosen, pair.chosen_unsafe) == (" Yes.", True)


def test_newer_pku_gives_the_category_of_the_harm() -> None:
    (pair,) = load_pairs([NEW_PKU])
    assert pair.category == "Economic Crime"


def test_pku_without_flags_leaves_them_unknown() -> None:
    row = {name: value for name, value in OLD_PKU.items() if not name.startswith("is_")}
    (pair,) = load_pairs([row])
    assert (pair.chosen_unsafe, pair.rejected_unsafe) == (None, None)


def test_pku_from_csv_reads_its_texts_as_flags_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "pku.csv"
    path.write_text(",".join(OLD_PKU) + "\n" + ",".join(map(str, OLD_PKU.values())) + "\n", encoding="utf-8-sig")
    assert load_pairs(path).pairs == load_pairs([OLD_PKU]).pairs


def test_rows_that_give_no_pair_are_counted_by_reason() -> None:
    rows = [
        OLD_PKU,
        OLD_PKU | {"safer_response_id": None},
        OLD_PKU | {"response_0": "No."},
        OLD_PKU | {"response_1": " "},
        OLD_PKU,
    ]
    found = load_pairs(rows)
    assert found.dropped == {
        "without a safer_response_id": 1,
        "with equal responses": 1,
        "with an empty response": 1,
    }
    assert len(found) == 2, "duplicate prompts stay"
    assert "1 with equal responses" in found.summary()


def test_null_fields_and_halves_of_characters_are_counted_and_left_out() -> None:
    row = {"prompt": "p", "chosen": " a", "rejected": " b"}
    bad = [{"chosen": None}, {"rejected": None}, {"chosen": " \ud83d"}, {"prompt": "\ude00"}, {"prompt": None}]
    found = load_pairs([row, *(row | change for change in bad)])
    assert found.dropped == {
        "with an empty response": 2,
        "with half of a surrogate pair, which is no character": 2,
        "without a shared beginning": 1,
    }
    assert len(found) == 1
    prompts = load_prompts([{"prompt": "\ud83d"}, {"prompt": "\U0001f600"}])
    assert prompts.dropped == {"with half of a surrogate pair, which is no character": 1}
    assert len(prompts) == 1


def hh(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def test_hh_prompt_ends_with_the_last_assistant_marker() -> None:
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    found = load_pairs([hh(prompt, " d", " e")])
    assert found.pairs == [PreferencePair(prompt, " d", " e", chosen_unsafe=False, rejected_unsafe=True)]
    assert found.format == "hh"


def test_hh_rows_whose_prompts_differ_are_counted_and_left_out() -> None:
    good = hh("\n\nHuman: a\n\nAssistant:", " d", " e")
    early = {
        "chosen": "\n\nHuman: a\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e\n\nHuman: f\n\nAssistant: g",
    }
    none = {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}
    found = load_pairs([good, early, none])
    assert len(found) == 1
    assert found.dropped == {"whose transcripts differ before the last answer": 1, "without an assistant turn": 1}


USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
RENDERED = ("\n\nHuman: q\n\nAssistant:", " good", " bad")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "The sky", "chosen": " is blue", "rejected": " is mad"}, ("The sky", " is blue", " is mad")),
        ({"chosen": "The sky is blue", "rejected": "The sky is black"}, ("The sky is", " blue", " black")),
        ({"chosen": "The sky is", "rejected": "The sky is black"}, ("The sky", " is", " is black")),
        ({"prompt": "I", "chosen": "I agree.", "rejected": "I do not."}, ("I", "I agree.", "I do not.")),
        (
            {"prompt": RENDERED[0], "chosen": RENDERED[0] + " good", "rejected": RENDERED[0] + " bad"},
            RENDERED,
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, RENDERED),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, RENDERED),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, RENDERED),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, RENDERED),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, RENDERED),
    ],
    ids=[
        "text",
        "implicit",
        "one-is-prefix",
        "begins-like-its-prompt",
        "transcript-repeated",
        "messages",
        "mixed",
        "implicit-messages",
        "both",
        "last-turn",
    ],
)
def test_trl_forms_give_prompt_and_answers(row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    found = load_pairs([row])
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in found] == [expected]
    assert found.format == "trl"
    assert found.messages == isinstance(row["chosen"], list)


def test_trl_continues_a_given_prompt_with_several_turns() -> None:
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    (pair,) = load_pairs([{"prompt": [USER], "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}])
    assert pair.prompt == "\n\nHuman: q\n\nAssistant: a\n\nHuman: b\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([USER, GOOD], [{"role": "user", "content": "other"}, BAD], "whose transcripts differ before the last answer"),
        ([USER, USER], [USER, BAD], "whose last turn is not the assistant's"),
        ([USER, {"role": "tool", "content": "x"}], [USER, BAD], "with a role other than system, user, assistant"),
        ([GOOD], [BAD], "without a prompt"),
    ],
)
def test_trl_rows_without_a_shared_prompt_are_counted(chosen: Any, rejected: Any, reason: str) -> None:
    found = load_pairs([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"chosen": chosen, "rejected": rejected}])
    assert found.dropped == {reason: 1}


def test_a_marker_inside_a_message_cannot_pass_for_a_turn() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "x\n\n\nAssistant: sure\n\nHuman: y"},
    ]
    parsed = parse_transcript(render_transcript(messages))
    assert [message["role"] for message in parsed] == ["system", "user"]
    assert parsed[1]["content"] == "x\nAssistant: sure\nHuman: y"


def test_a_prompt_without_markers_is_one_user_message() -> None:
    assert parse_transcript("How?") == [{"role": "user", "content": "How?"}]


@pytest.mark.parametrize(
    ("row", "format", "text", "category", "identifier"),
    [
        (
            {"id": 7, "risk_area": "r", "types_of_harm": "t", "specific_harms": "s", "question": "q"},
            "do-not-answer",
            "q",
            "t",
            "7",
        ),
        (
            {
                "Behavior": "q",
                "FunctionalCategory": "standard",
                "SemanticCategory": "c",
                "Tags": "",
                "ContextString": "",
            }
            | {"BehaviorID": "b"},
            "harmbench",
            "q",
            "c",
            "b",
        ),
        (
            {"Behavior": "q", "FunctionalCategory": "contextual", "SemanticCategory": "c", "ContextString": "k"}
            | {"BehaviorID": "b"},
            "harmbench",
            "k\n\n---\n\nq",
            "c",
            "b",
        ),
        ({"prompt": "q", "category": "c"}, "prompt", "q", "c", "0"),
        ({"qid": 3, "question": "q", "1-category": "c", "2-category": "d"}, "salad-bench", "q", "c", "3"),
        ({"prompt": "q", "1-category": "c"}, "salad-bench", "q", "c", "0"),
    ],
)
def test_prompt_sets_are_recognised(
    row: dict[str, Any], format: str, text: str, category: str, identifier: str
) -> None:
    found = load_prompts([row])
    assert found.format == format
    assert found[0].prompt == f"\n\nHuman: {text}\n\nAssistant:"
    assert (found[0].category, found[0].identifier) == (category, identifier)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([USER, GOOD], "whose last turn is not the user's"),
        ([], "whose last turn is not the user's"),
        (math.nan, "with an empty prompt"),
        (5, "with a prompt that is neither text nor messages"),
        ([{"role": "user", "content": None}], "with content that is not text"),
    ],
)
def test_one_bad_prompt_is_counted(prompt: Any, reason: str) -> None:
    found = load_prompts([{"prompt": prompt}, {"prompt": "a", "category": math.nan, "id": math.nan}])
    assert found.dropped == {reason: 1}
    assert [(one.category, one.identifier) for one in found] == [("", "1")]


def test_prompts_are_messages_or_transcripts_too() -> None:
    expected = "\n\nHuman: q\n\nAssistant:"
    assert [one.prompt for one in load_prompts([{"prompt": [USER]}, {"prompt": expected}])] == [expected, expected]


def test_empty_prompts_are_counted_and_identifiers_keep_their_row() -> None:
    found = load_prompts([{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}])
    assert [prompt.identifier for prompt in found] == ["0", "2"]
    assert found.dropped == {"with an empty prompt": 1}


def test_limit_stops_after_that_many_pairs() -> None:
    rows = [OLD_PKU | {"prompt": str(number)} for number in range(5)]
    assert len(load_pairs(rows, limit=3)) == 3
    assert len(load_prompts(rows, limit=2)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": [{"a": 1, "b": 2}]}, "no known preference format; found the columns a, b; expected pku: prompt"),
        (
            {"source": [{"a": 1}], "format": "hh"},
            "not of the format hh; found the columns a; expected chosen, rejected",
        ),
        ({"source": [OLD_PKU], "format": "pkü"}, "format is 'pkü'; expected auto or one of pku, hh, trl"),
        ({"source": [OLD_PKU], "limit": 0}, "limit is 0"),
        ({"source": [OLD_PKU], "split": "train"}, "split 'train' was asked for, but rows in memory has no splits"),
        ({"source": [OLD_PKU], "preference": "worse"}, "preference is 'worse'; expected one of safer, better"),
        ({"source": [{"chosen": "a b", "rejected": "a c"}], "preference": "better"}, "is for the format pku"),
        ({"source": [OLD_PKU | {"response_0": "No."}]}, "no usable pair: 0 pairs from memory .left out: 1 with equal"),
        ({"source": []}, "memory is empty"),
        (
            {"source": [{"prompt": "x", "response_0": "a", "response_1": "b", "better_response_id": 0}]},
            "no usable pair",
        ),
    ],
)
def test_bad_input_gives_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_pairs(**arguments)
    assert "\n" not in str(error.value)


def test_unknown_prompt_columns_are_named() -> None:
    with pytest.raises(
        UserError, match="no known prompt format; found the columns x; expected do-not-answer: question"
    ):
        load_prompts([{"x": 1}])


def test_generated_rows_load_as_pku(synthetic_rows: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows["train"]))
    found = load_pairs(path)
    assert (found.format, len(found), found.dropped) == ("pku", len(synthetic_rows["train"]), {})
    assert all(pair.rejected_unsafe and not pair.chosen_unsafe and pair.category for pair in found)
