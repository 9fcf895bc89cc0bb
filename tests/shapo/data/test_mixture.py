"""Several sources as one set: shares, order, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shapo.data.mixture import load_mixture, parse_source
from shapo.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """a.jsonl with 90 pairs, b.jsonl with 30 and a row that gives none."""
    for name, count in (("a", 90), ("b", 30)):
        rows = [{"prompt": f"{name}{number}", "chosen": " x", "rejected": " y"} for number in range(count)]
        rows += [{"prompt": name, "chosen": None, "rejected": " y"}] if name == "b" else []
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}


def taken(files: dict[str, str], *weights: str, limit: int | None = None) -> dict[str, list[int]]:
    found = load_mixture([files[name] + weight for name, weight in zip("ab", weights, strict=True)], limit=limit)
    return {name: [int(pair.prompt[1:]) for pair in found if pair.prompt[0] == name] for name in "ab"}


@pytest.mark.parametrize(
    ("weights", "limit", "counts"),
    [
        ((":0.7", ":0.3"), None, (70, 30)),
        ((":7", ":3"), None, (70, 30)),
        ((":0.5", ":0.5"), None, (30, 30)),
        ((":0.9", ":0.1"), None, (90, 10)),
        ((":2", ":1"), 10, (7, 3)),
        ((":1", ":1"), 7, (4, 3)),
        (("", ""), None, (90, 30)),
        (("", ""), 100, (90, 10)),
        (("", ""), 20, (20, 0)),
    ],
)
def test_every_source_gives_its_share_and_no_pair_twice(
    weights: tuple[str, str], limit: int | None, counts: tuple[int, int], files: dict[str, str]
) -> None:
    found = taken(files, *weights, limit=limit)
    assert tuple(map(len, found.values())) == counts
    assert all(numbers == sorted(set(numbers)) for numbers in found.values()), "in the order of the file"


def test_a_share_is_spread_over_the_file_and_grows_by_adding(files: dict[str, str]) -> None:
    small, large = taken(files, ":1", ":1", limit=20)["a"], taken(files, ":1", ":1", limit=40)["a"]
    assert set(small) < set(large)
    assert max(small) > 45 > min(small)


def test_the_summary_says_what_was_left_out_and_taken(files: dict[str, str]) -> None:
    found = load_mixture([f"{files['a']}:0.5", f"{files['b']}:0.5"])
    expected = f"60 pairs from 30 of {files['a']} (0.5, 90 pairs) + 30 of {files['b']} (0.5, 30 pairs)"
    assert found.summary() == f"{expected} (left out: 1 with an empty response)"
    assert load_mixture([files["b"]]).source == files["b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl:0.7", ("a.jsonl", 0.7)),
        ("owner/name:config", ("owner/name:config", None)),
        ("owner/name:config:2", ("owner/name:config", 2.0)),
        ("a:1e-3", ("a", 1e-3)),
        ("a.jsonl", ("a.jsonl", None)),
    ],
)
def test_a_weight_is_the_number_behind_the_last_colon(text: str, expected: tuple[str, float | None]) -> None:
    assert parse_source(text) == expected


def test_a_file_of_that_very_name_has_no_weight(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl:1").touch()
    assert parse_source(str(tmp_path / "a.jsonl:1")) == (str(tmp_path / "a.jsonl:1"), None)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no source of pairs is given"),
        (["a:1", "b"], "1 of 2 sources have a weight; give each of several one"),
        (["a:1"], "1 of 1 sources have a weight"),
        (["a:0", "b:1"], "the weight of a:0 is 0; expected a number above 0"),
        (["a:1.2.3", "b:1"], "the weight of a:1.2.3 is 1.2.3"),
        (["{a}", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["a:1e999", "b:1"], "the weight of a:1e999 is 1e999"),
    ],
)
def test_contradictory_sources_are_refused(sources: list[str], message: str, files: dict[str, str]) -> None:
    with pytest.raises(UserError, match=message):
        load_mixture([source.format(**files) for source in sources], limit=5)
