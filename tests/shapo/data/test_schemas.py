"""One bad row: it is counted under its reason, and every other row stays."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shapo.data.formats import load_pairs, load_prompts
from shapo.data.pairs import render_transcript

OLD_PKU = {
    "prompt": "May I?",
    "response_0": "Yes.",
    "response_1": "No.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}
TEXTS = {"prompt": "p", "chosen": " a", "rejected": " b"}
TALK = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def said(**changes: Any) -> dict[str, Any]:
    """A row of messages whose chosen answer is changed."""
    return TALK | {"chosen": [TALK["chosen"][0] | changes]}


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (OLD_PKU, OLD_PKU | {"safer_response_id": 7}, "without a safer_response_id"),
        (OLD_PKU, OLD_PKU | {"safer_response_id": math.nan}, "without a safer_response_id"),
        (OLD_PKU, {"prompt": "x"}, "without a safer_response_id"),
        (OLD_PKU, OLD_PKU | {"response_0": None}, "with an empty response"),
        (OLD_PKU, OLD_PKU | {"response_1": math.nan}, "with an empty response"),
        (OLD_PKU, OLD_PKU | {"response_1": 5}, "whose response_1 is not text"),
        (OLD_PKU, OLD_PKU | {"prompt": None}, "without a prompt"),
        (OLD_PKU, OLD_PKU | {"is_response_0_safe": "perhaps"}, "with a safety flag that is neither true nor false"),
        (TEXTS, TEXTS | {"chosen": math.nan}, "with an empty response"),
        (TEXTS, TEXTS | {"chosen": 1.5}, "with what is neither text nor messages"),
        (TEXTS, TEXTS | {"prompt": 3}, "with what is neither text nor messages"),
        (TEXTS, TEXTS | {"category": "\ud83d"}, "with half of a surrogate pair, which is no character"),
        (TEXTS, TEXTS | {"chosen": TALK["chosen"]}, "with what is neither text nor messages"),
        (TALK, said(content=None), "with content that is not text"),
        (TALK, said(content=math.nan), "with content that is not text"),
        (TALK, said(content=1.0), "with content that is not text"),
        (TALK, said(content=[{"type": "image_url", "image_url": "x"}]), "with content that is not text"),
        (TALK, said(content=[{"type": "text"}]), "with content that is not text"),
        (TALK, said(content=["text"]), "with content that is not text"),
        (TALK, said(role=None), "with a role other than system, user, assistant"),
        (TALK, said(tool_calls=[{"name": "f"}]), "with tool calls or reasoning beside the text"),
        (TALK, said(reasoning_content="because"), "with tool calls or reasoning beside the text"),
        (TALK, said(thinking="because"), "with tool calls or reasoning beside the text"),
        (TALK, TALK | {"tools": [{"name": "f"}]}, "with tools, images or template arguments beside the messages"),
        (TALK, TALK | {"chosen": [{"x": 1}]}, "with a role other than system, user, assistant"),
        (TALK, TALK | {"chosen": ["good"]}, "with what is neither text nor messages"),
        (TALK, TALK | {"rejected": []}, "with an empty response"),
    ],
)
@pytest.mark.parametrize("place", [0, 1], ids=["first", "later"])
def test_one_bad_row_is_counted_and_the_others_stay(
    good: dict[str, Any], bad: dict[str, Any], reason: str, place: int
) -> None:
    found = load_pairs([bad, good, good] if place == 0 else [good, bad, good])
    assert (len(found), found.dropped) == (2, {reason: 1})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(good=st.sampled_from([OLD_PKU, TEXTS, TALK]), data=st.data())
@settings(deadline=None, max_examples=200)
def test_whatever_a_cell_holds_every_row_is_a_pair_or_counted(good: dict[str, Any], data: st.DataObject) -> None:
    bad = good | {data.draw(st.sampled_from(sorted(good))): data.draw(JUNK)}
    found = load_pairs([good, bad, good])
    assert len(found) + sum(found.dropped.values()) == 3
    assert len(found) >= 2
    prompts = load_prompts([{"prompt": "a"}, {"prompt": data.draw(JUNK), "category": data.draw(JUNK)}])
    assert len(prompts) + sum(prompts.dropped.values()) == 2


@pytest.mark.parametrize("safe", [False, "False", "false", 0, "0", 0.0, "0.0"])
def test_a_safety_flag_is_read_as_json_csv_and_tables_write_it(safe: object) -> None:
    (pair,) = load_pairs([OLD_PKU | {"is_response_0_safe": safe}])
    assert pair.rejected_unsafe is True


@pytest.mark.parametrize("empty", [None, "", math.nan])
def test_an_empty_safety_flag_is_unknown(empty: object) -> None:
    (pair,) = load_pairs([OLD_PKU | {"is_response_0_safe": empty}])
    assert (pair.chosen_unsafe, pair.rejected_unsafe) == (False, None)


@pytest.mark.parametrize(
    "harms",
    [
        {"Privacy": False, "Crime": True},
        {"Privacy": math.nan, "Crime": True},
        str({"Privacy": False, "Crime": True}),
        json.dumps({"Privacy": False, "Crime": True}),
        ["Crime"],
    ],
    ids=["object", "nan", "python-text", "json-text", "list"],
)
def test_the_category_is_the_first_harm_that_applies(harms: object) -> None:
    (pair,) = load_pairs([OLD_PKU | {"response_0_harm_category": harms}])
    assert pair.category == "Crime"


def test_a_prompt_that_the_answers_repeat_stands_once_and_no_turn_is_lost() -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    good, bad = TALK["chosen"], TALK["rejected"]
    repeated = {"prompt": [system, user], "chosen": [user, *good], "rejected": [user, *bad]}
    (pair,) = load_pairs([repeated])
    assert pair.prompt == render_transcript([system, user])
    again = {"role": "assistant", "content": "What?"}
    followed = {"prompt": [user], "chosen": [again, user, *good], "rejected": [again, user, *bad]}
    (pair,) = load_pairs([followed])
    assert pair.prompt == render_transcript([user, again, user])
