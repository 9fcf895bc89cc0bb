"""Files, folders and hub names: every type is read, every way to fail is told in one line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shapo.data.formats import load_pairs
from shapo.data.sources import read_rows
from shapo.errors import UserError

ROWS = [{"prompt": f"p{number}", "text": "ä\u2028\n"} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    "lines.json": lambda path: path.write_text(LINES, encoding="utf-8"),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.csv": lambda path: path.write_text(
        "prompt,text\n" + "".join(f'{row["prompt"]},"{row["text"]}"\n' for row in ROWS), encoding="utf-8-sig"
    ),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_its_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    rows, source = read_rows(tmp_path / name)
    assert [dict(row) for row in rows] == ROWS
    assert source == str(tmp_path / name)


def test_a_folder_has_one_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "test.json").write_text('[{"a": 2}]')
    assert list(read_rows(tmp_path)[0]) == [{"a": 1}]
    assert list(read_rows(tmp_path, "test")[0]) == [{"a": 2}]
    with pytest.raises(UserError, match=r"no file for the split 'dev' \(it holds test.json, train.jsonl\)"):
        read_rows(tmp_path, "dev")
    (tmp_path / "train.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match="several files for the split 'train'"):
        read_rows(tmp_path, "train")


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "is empty; expected at least one row"),
    "blank.jsonl": (b"\n \n", "is empty; expected at least one row"),
    "empty.json": (b"[]", "is empty; expected at least one row"),
    "header.csv": (b"a,b\n", "is empty; expected at least one row"),
    "cut.jsonl.gz": (gzip.compress(os.urandom(200).hex().encode())[:-20], "truncated or not gzip"),
    "plain.jsonl.gz": (b'{"a": 1}\n', "truncated or not gzip"),
    "broken.jsonl": (b'{"a": 1}\n\n{"a": \n', r"broken.jsonl, line 3: broken JSON .*expected one object a line"),
    "broken.json": (b'[{"a": 1},\n{"a": }]', "broken.json, line 2: broken JSON"),
    "scalar.jsonl": (b'{"a": 1}\n[1, 2]\n', "row 2 is a list; expected an object with named columns"),
    "latin.jsonl": ('{"a": "ä"}'.encode("latin-1"), "is not UTF-8 text"),
    "ragged.csv": (b"a,b\n1,2\n3\n", "line 3: the row's number of fields differs from the header's 2"),
    "quote.csv": (b'a,b\n1,"2\n', "broken CSV after line 1"),
    "broken.parquet": (b"PAR1xx", "is not a readable parquet file"),
    "deep.jsonl": (b'{"a": ' + 100_000 * b"[", "line 1: JSON that Python does not read"),
    "digits.json": (b'[{"a": ' + 5000 * b"9" + b"}]", "JSON that Python does not read"),
    "deep.json": (100_000 * b"[", "JSON of too many levels"),
    "digits.jsonl": (b'{"a": ' + 5_000 * b"1" + b"}", "line 1: JSON that Python does not read"),
    "text.txt": (b"x", "cannot read this type of file; expected one of .jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gives_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(tmp_path / name)[0])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["missing.jsonl", "./missing", "/missing/data", "a/b/c", "~/missing", "~nobody-of-that-name/x", "what is this?"],
)
def test_a_missing_file_gives_one_clear_line(name: str) -> None:
    with pytest.raises(UserError, match="no such file: "):
        read_rows(name)


def test_too_long_a_name_gives_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"^cannot read .*: File name too long$"):
        read_rows("/tmp/" + "x" * 5000 + ".jsonl")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="has no splits; leave the split out"):
        read_rows(tmp_path / "a.jsonl", "train")


class Hub:
    """Stands in for `datasets.load_dataset`; answers from a table and records how it was asked."""

    def __init__(self, answer: list[dict[str, Any]] | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, repository: str, name: str | None = None, *, split: str, data_dir: str | None = None) -> Any:
        self.calls.append((repository, name, split, data_dir))
        if name == "folder":
            raise ValueError("BuilderConfig 'folder' not found. Available: ['default']")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]] | Exception], Hub]:
    def install(answer: list[dict[str, Any]] | Exception) -> Hub:
        import datasets

        stand_in = Hub(answer)
        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        return stand_in

    return install


def test_a_hub_name_is_loaded_by_datasets(hub: Callable[..., Hub]) -> None:
    asked = hub(ROWS)
    rows, source = read_rows("owner/name:config", "test")
    assert list(rows) == ROWS
    assert source == "owner/name:config [test]"
    assert asked.calls == [("owner/name", "config", "test", None)]


def test_the_train_split_is_the_default_and_a_folder_serves_as_configuration(hub: Callable[..., Hub]) -> None:
    asked = hub(ROWS)
    assert list(read_rows("owner/name:folder")[0]) == ROWS
    assert asked.calls[-1] == ("owner/name", None, "train", "folder")


@pytest.mark.parametrize(
    ("failure", "hint"),
    [
        (ConnectionError("Couldn't connect to the hub\nlong trace"), "the hub cannot be reached; give a local file"),
        (RuntimeError("Dataset 'x' is a gated dataset on the Hub."), "ask for access on its page and log in"),
        (FileNotFoundError("Dataset 'x' doesn't exist on the Hub"), "no local file and no hub data set has this name"),
        (ValueError('Unknown split "dev". Should be one of [...]'), 'Unknown split "dev"'),
    ],
)
def test_a_hub_failure_gives_one_clear_line(hub: Callable[..., Hub], failure: Exception, hint: str) -> None:
    hub(failure)
    with pytest.raises(UserError, match="cannot load the data set owner/name: ") as error:
        load_pairs("owner/name")
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def hub_of_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[bool]:
    """`datasets` itself, which reads owner/name from a local folder; lists whether it was asked to stream."""
    import datasets

    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        lines = "".join(json.dumps({"prompt": row["prompt"], "chosen": "a", "rejected": "b"}) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    asked, load, cache = [], datasets.load_dataset, str(tmp_path_factory.mktemp("cache"))

    def load_local(name: str, configuration: str | None, **options: Any) -> Any:
        assert name == "owner/name"
        asked.append(options.get("streaming", False))
        return load(str(tmp_path), configuration, cache_dir=cache, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return asked


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_data_set_is_read_whole_or_row_by_row(hub_of_a_folder: list[bool], stream: bool) -> None:
    found = load_pairs("owner/name", split="train", stream=stream)
    assert [pair.prompt for pair in found] == [row["prompt"] for row in ROWS]
    assert len(load_pairs("owner/name", split="test", stream=stream)) == 1
    assert len(load_pairs("owner/name", stream=stream, limit=2)) == 2
    assert hub_of_a_folder == [stream] * 3


def test_a_failure_while_rows_are_streamed_gives_one_clear_line(hub: Callable[..., Hub]) -> None:
    def rows() -> Any:
        yield {"prompt": "p", "chosen": "a", "rejected": "b"}
        raise ConnectionError("Couldn't connect\nlong trace")

    hub(rows())
    with pytest.raises(UserError, match="cannot load the data set owner/name: Couldn't connect") as error:
        load_pairs("owner/name")
    assert "\n" not in str(error.value)
