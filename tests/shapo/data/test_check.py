"""`shapo data check`: every count against a set in which it was put by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shapo.cli import main
from shapo.data.check import check_pairs, render_pair, report_lines
from shapo.data.formats import load_pairs
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from tests.support.chat_templates import chat_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS = [
    {"prompt": "one", "chosen": " aa", "rejected": " b"},
    {"prompt": "one", "chosen": " aa", "rejected": " b"},
    {"prompt": "one", "chosen": " b", "rejected": " aa"},
    {"prompt": "two", "chosen": "two c", "rejected": "two dddd", "category": "x"},
    {"prompt": "three", "chosen": " e", "rejected": " f"},
    {"prompt": "four", "chosen": None, "rejected": " f"},
]


def test_duplicates_prefixes_and_balance_are_counted() -> None:
    found = check_pairs(load_pairs(ROWS, format="trl"))
    assert found["pairs"] == 5
    assert found["dropped"] == {"with an empty response": 1}
    assert found["duplicates"] == {
        "pairs": 1,
        "with_exchanged_labels": 1,
        "prompts_of_several_pairs": 1,
        "prompts": 3,
    }
    assert found["prefixes"]["answers_that_begin_with_their_prompt"] == 1
    assert found["balance"]["chosen_longer"] == pytest.approx(2 / 5)
    assert found["balance"]["equally_long"] == pytest.approx(1 / 5)
    assert found["balance"]["categories"] == {"": 4, "x": 1}
    assert found["balance"]["chosen_unsafe"] == {"yes": 0, "no": 0, "unknown": 5}
    assert found["lengths"]["rejected"] == {"median": 2, "p90": 8, "p99": 8, "max": 8}
    assert found["unit"] == "characters"


def test_rows_of_hh_whose_transcripts_differ_too_early_are_counted_as_such() -> None:
    start = "\n\nHuman: a\n\nAssistant:"
    rows = [
        {"chosen": f"{start} b", "rejected": f"{start} c"},
        {"chosen": f"{start} b\n\nHuman: d\n\nAssistant: e", "rejected": f"{start} c\n\nHuman: d\n\nAssistant: e"},
    ]
    found = check_pairs(load_pairs(rows))
    assert found["prefixes"]["rows_whose_transcripts_differ"] == 1
    assert found["balance"]["rejected_unsafe"] == {"yes": 1, "no": 0, "unknown": 0}


def test_prompts_and_pairs_in_common_with_another_set_are_counted_whatever_their_labels() -> None:
    other = load_pairs([ROWS[2], {"prompt": "three", "chosen": " g", "rejected": " h"}])
    found = check_pairs(load_pairs(ROWS, format="trl"), against=other)
    assert found["in_common"] == {"source": "memory", "prompts": 2, "pairs_with_such_a_prompt": 4, "pairs": 3}


def test_lengths_in_tokens_are_those_before_the_cut_and_cuts_are_counted() -> None:
    encoder = PairEncoder(chat_tokenizer("x"), max_length=20, max_prompt_length=8)
    sizes = [(4, 3, 5), (30, 3, 5), (4, 40, 50), (30, 40, 50)]  # in bytes, each a token; EOS is one more
    rows = [{"prompt": "p" * p, "chosen": "a" * c, "rejected": "a" * r} for p, c, r in sizes]
    found = check_pairs(load_pairs(rows, format="trl"), encoder=encoder)
    assert found["lengths"]["prompt"] == {"median": 30, "p90": 30, "p99": 30, "max": 30}
    assert found["lengths"]["rejected"]["max"] == 51
    assert found["cut"] == {
        "max_length": 20,
        "pairs": 3,
        "prompts": 2,
        "responses": 4,
        "equal_after_the_cut": 2,
    }
    assert "! 3 pairs are cut to 20 tokens: 2 prompts, 4 responses" in report_lines(found)


def test_a_pair_is_written_with_its_template_and_its_trained_tokens() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    tokenizer = chat_tokenizer(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    (pair,) = load_pairs([{"prompt": [{"role": "user", "content": "q"}], "chosen": "yes", "rejected": "no"}])
    # "<|user|>" is eight bytes, the other two marks are tokens of the vocabulary.
    assert render_pair(pair, PairEncoder(tokenizer, chat_template=True)) == [
        "chosen (12 tokens of prompt, 4 learned):",
        "<|user|>q<|end|>",
        "<|assistant|>«yes<|end|>»",
        "rejected (12 tokens of prompt, 3 learned):",
        "<|user|>q<|end|>",
        "<|assistant|>«no<|end|>»",
    ]


@pytest.fixture
def files(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[4]) + "\n")
    return {name: str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "model", "report.json")}


def test_the_command_prints_the_counts_and_keeps_them(files: dict[str, str], capsys: Any) -> None:
    options = [
        "--against",
        files["b.jsonl"],
        "--model",
        files["model"],
        "--pair",
        "4",
        "--output",
        files["report.json"],
    ]
    assert main(["data", "check", files["a.jsonl"], *options]) == 0
    printed = capsys.readouterr().out
    assert "! 1 pairs occur more than once" in printed
    assert f"! 1 pairs have a prompt of {files['b.jsonl']}" in printed
    assert "<|bos|>two«two c<|eos|>»" in printed
    report = json.loads(Path(files["report.json"]).read_text())
    assert report["in_common"]["pairs"] == 1
    assert report["unit"] == "tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat-template"], "--chat-template has no effect without --model"),
        (["--pair", "6", "--model", "{model}"], "--pair is 6, but there are 5 pairs"),
        (["--against", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
    ],
)
def test_an_impossible_check_gives_one_line(
    options: list[str], message: str, files: dict[str, str], capsys: Any
) -> None:
    options = [part.replace("{model}", files["model"]) for part in options]
    assert main(["data", "check", files["a.jsonl"], *options]) == 2
    assert message in capsys.readouterr().err


def test_many_pairs_are_divided_over_processes_and_counted_as_by_one(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "p " * i, "chosen": " a" * (i % 7 + 1), "rejected": " b" * (i % 5 + 1)} for i in range(1, 31)]
    pairs = load_pairs(rows, format="trl")
    encoder = PairEncoder(tiny_tokenizer, max_length=24, max_prompt_length=12)
    by_one = check_pairs(pairs, encoder=encoder)
    monkeypatch.setattr("shapo.data.check._FIRST", 4)
    monkeypatch.setattr("shapo.data.check._MANY", 10)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert check_pairs(pairs, encoder=encoder) == by_one
    assert by_one["cut"]["pairs"] > 0
    narrow = PairEncoder(tiny_tokenizer, max_length=24, max_prompt_length=12, positions=20)
    told = []
    for many in (10**9, 10):
        monkeypatch.setattr("shapo.data.check._MANY", many)
        with pytest.raises(UserError, match=r"^pair \d+: a text of") as error:
            check_pairs(pairs, encoder=narrow)
        told.append(str(error.value))
    assert told[0] == told[1]
