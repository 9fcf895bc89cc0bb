"""The generated data set: its schema, its splits, and that there is something in it to learn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shapo.data import synthetic
from shapo.data.formats import load_pairs
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIZES = {"sft": 300, "train": 200, "selection": 200, "test": 200, "test_unseen": 200}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return synthetic.generate(3, **SIZES)


def test_a_seed_decides_everything(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert synthetic.generate(3, **SIZES) == splits
    assert synthetic.generate(4, **SIZES) != splits


def test_no_prompt_is_in_two_rows_and_so_none_in_two_splits(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert tuple(splits) == synthetic.SPLITS
    assert {name: len(rows) for name, rows in splits.items()} == SIZES
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts))


def test_twelve_categories_are_seen_and_others_only_in_the_unseen_split(
    splits: dict[str, list[dict[str, Any]]],
) -> None:
    assert len(synthetic.CATEGORIES) == 12
    assert not set(synthetic.CATEGORIES) & set(synthetic.UNSEEN_CATEGORIES)
    for name, rows in splits.items():
        expected = synthetic.UNSEEN_CATEGORIES if name == "test_unseen" else synthetic.CATEGORIES
        assert {row["category"] for row in rows} == set(expected)


def test_one_response_is_safe_in_either_place_and_being_better_says_nothing(
    splits: dict[str, list[dict[str, Any]]],
) -> None:
    rows = [row for rows in splits.values() for row in rows]
    for row in rows:
        safe = row["safer_response_id"]
        assert row[f"is_response_{safe}_safe"]
        assert not row[f"is_response_{1 - safe}_safe"]
        assert row[f"response_{safe}_severity_level"] == 0
        assert row[f"response_{1 - safe}_severity_level"] in (1, 2, 3)
        assert row[f"response_{1 - safe}_harm_category"] == {row["category"]: True}
    # Binomial(1100, 1/2): standard deviation 16.6.
    for share in (
        sum(row["safer_response_id"] for row in rows),
        sum(row["better_response_id"] == row["safer_response_id"] for row in rows),
    ):
        assert abs(share - len(rows) / 2) < 5 * 16.6


def words(text: str) -> set[str]:
    return set(text.lower().replace(",", " ").replace(".", " ").split())


def test_no_single_word_gives_the_style_away(splits: dict[str, list[dict[str, Any]]]) -> None:
    """The best rule "safe if (not) the word occurs" stays far from certain, so the styles have to be learned."""
    answers = [
        (words(row[f"response_{side}"]), row[f"is_response_{side}_safe"]) for row in splits["sft"] for side in (0, 1)
    ]
    counts = Counter[tuple[str, bool]]((word, safe) for present, safe in answers for word in present)
    best = max(abs(counts[word, True] - counts[word, False]) for word, _ in counts)
    assert 0.5 + best / len(answers) < 0.65


def test_phrases_of_the_unseen_categories_are_mostly_seen_ones(splits: dict[str, list[dict[str, Any]]]) -> None:
    known = set.union(*(words(row[f"response_{side}"]) for row in splits["sft"] for side in (0, 1)))
    answers = [words(row[f"response_{side}"]) for row in splits["test_unseen"] for side in (0, 1)]
    things = {
        "divorce",
        "debt",
        "illness",
        "past",
        "vote",
        "permit",
        "stamp",
        "verdict",
        "drum",
        "horn",
        "radio",
        "whistle",
    }
    familiar = sum(answer - things <= known for answer in answers) / len(answers)
    assert 0.6 < familiar < 0.95


def test_sft_examples_mix_both_styles(splits: dict[str, list[dict[str, Any]]]) -> None:
    rows = splits["sft"]
    examples = synthetic.sft_examples(rows, seed=0)
    assert examples == synthetic.sft_examples(rows, seed=0)
    safe = 0
    for (prompt, response), row in zip(examples, rows, strict=True):
        assert prompt == f"\n\nHuman: {row['prompt']}\n\nAssistant:"
        safe += response == " " + row[f"response_{row['safer_response_id']}"]
    assert 100 < safe < 200


def test_written_files_load_as_pairs(tmp_path: Path) -> None:
    sizes = dict.fromkeys(synthetic.SPLITS, 20)
    paths = synthetic.write(tmp_path / "new", 5, **sizes)
    assert set(paths) == set(synthetic.SPLITS)
    for split, rows in synthetic.generate(5, **sizes).items():
        assert [json.loads(line) for line in paths[split].read_text().splitlines()] == rows
        assert len(load_pairs(tmp_path / "new", split=split)) == 20


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 0}, "the split train is to have 0 rows"),
        ({"sft": 10**6}, r"rows were asked for in sft, train.*there are"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthetic.generate(0, **sizes)


def test_the_tokenizer_reloads_as_any_other(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "\n\nHuman: Ümläut 你好?\n\nAssistant: So."
    assert reloaded(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert reloaded.decode(reloaded(text)["input_ids"], skip_special_tokens=True) == text
    assert reloaded.chat_template == tiny_tokenizer.chat_template
    assert (reloaded.bos_token, reloaded.eos_token, reloaded.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert PairEncoder(reloaded).encode("a", "b") == PairEncoder(tiny_tokenizer).encode("a", "b")


def test_training_the_tokenizer_twice_gives_the_same(synthetic_rows: dict[str, list[dict[str, Any]]]) -> None:
    texts = [row["response_0"] for row in synthetic_rows["sft"]]
    first, second = (synthetic.train_tokenizer(texts, 300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 300


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size is 100; expected at least 259"):
        synthetic.train_tokenizer(["a"], 100)


def test_a_pair_is_short_enough_for_a_quick_demo(
    tiny_encoder: PairEncoder, splits: dict[str, list[dict[str, Any]]]
) -> None:
    lengths = [
        len(encoded)
        for pair in load_pairs(splits["train"])
        for encoded in tiny_encoder.encode_pair(pair.prompt, pair.chosen, pair.rejected)
    ]
    assert max(lengths) < 96, "nothing is truncated"
