"""Rows from a local file, a folder of files or a hub data set, read lazily, with one clear line for each way to fail.

It knows file types, not schemas: what the columns mean is for `formats`.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from shapo.errors import UserError, first_line

__all__ = ["Row", "read_rows"]

Row = Mapping[str, Any]

_DEFAULT_SPLIT = "train"
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.+-]+)?")


def read_rows(
    source: str | os.PathLike[str] | Iterable[Row], split: str | None = None, *, stream: bool = False
) -> tuple[Iterator[Row], str]:
    """Rows of `source`, and the name that errors and reports give it.

    Args:
        source: a .json, .jsonl or .csv file, plain or .gz, or a .parquet file; a folder with one such file for each
            split (`train.jsonl`); a hub name, `owner/name` or `owner/name:configuration` (where there is no such
            configuration, a folder of that name); or rows already in memory.
        split: which file of a folder, or which split of a hub data set ("train" where none is given).
        stream: take the rows of a hub data set as they are drawn; else it is downloaded whole, and kept, first.

    Raises:
        UserError: the source is missing, or a split of a single file is asked for. While rows are drawn: an empty file,
            a truncated gzip, a broken line (with its number), a row that is no object, a gated or missing data set.
    """
    if not isinstance(source, (str, os.PathLike)):
        _no_split("rows in memory", split)
        return iter(source), "memory"
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))  # which leaves ~nobody as it is
    with _readable(path):
        is_folder, exists = path.is_dir(), path.exists()
        if is_folder:
            path = _split_file(path, split or _DEFAULT_SPLIT)
    if is_folder:
        pass
    elif exists:
        _no_split(name, split)
    elif _looks_local(name) or not _HUB_NAME.fullmatch(name):
        raise UserError(f"no such file: {name}")
    else:
        chosen = split or _DEFAULT_SPLIT
        return _hub_rows(name, chosen, stream), f"{name} [{chosen}]"
    reader = _reader(path)
    if reader is None:
        raise UserError(f"{path}: cannot read this type of file; expected one of {', '.join(_READERS)}")
    return _checked(path, reader), str(path)


def _no_split(name: str, split: str | None) -> None:
    if split is not None:
        raise UserError(f"split {split!r} was asked for, but {name} has no splits; leave the split out")


def _split_file(folder: Path, split: str) -> Path:
    found = [folder / f"{split}{suffix}" for suffix in _READERS if (folder / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        files = ", ".join(sorted(file.name for file in folder.iterdir() if file.is_file())[:8]) or "no files"
        problem = "several files" if found else "no file"
        raise UserError(f"{folder} has {problem} for the split {split!r} (it holds {files})")
    return found[0]


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(tuple(_READERS))


def _checked(path: Path, reader: Callable[[Path], Iterator[Any]]) -> Iterator[Row]:
    """The rows of a reader, its failures told in one line, and at least one row."""
    empty = True
    with _readable(path):
        for number, row in enumerate(reader(path), 1):
            if not isinstance(row, Mapping):
                raise UserError(f"{path}: row {number} is {_kind(row)}; expected an object with named columns")
            empty = False
            yield row
    if empty:
        raise UserError(f"{path} is empty; expected at least one row")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or not gzip ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    # utf-8-sig: spreadsheet programs write a byte order mark, which would become part of the first column's name.
    how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, "rt", **how) if path.name.endswith(".gz") else path.open("r", **how) as text:
        yield text


def _json_rows(path: Path) -> Iterator[Any]:
    """JSON lines, or one array of objects; both are published under both suffixes."""
    with _text(path) as text:
        first = next((line for line in text if line.strip()), "")
        if not first.lstrip().startswith("["):
            yield from _json_lines(path)
            return
    with _text(path) as text:
        try:
            yield from json.load(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from error
        except RecursionError as error:
            raise UserError(f"{path}: JSON of too many levels; expected an array of objects") from error
        except ValueError as error:  # a number of thousands of digits
            raise UserError(f"{path}: JSON that Python does not read ({error})") from error


def _json_lines(path: Path) -> Iterator[Any]:
    with _text(path) as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{path}, line {number}"
                problem = f"broken JSON ({error.msg} at column {error.colno})"
                raise UserError(f"{where}: {problem}; expected one object a line") from error
            except (RecursionError, ValueError) as error:  # too many levels, a number of thousands of digits
                raise UserError(f"{path}, line {number}: JSON that Python does not read ({error})") from error


def _csv_rows(path: Path) -> Iterator[Any]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _text(path) as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: the row's number of fields differs from the header's "
                        f"{len(reader.fieldnames or [])}"
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"{path}: broken CSV after line {reader.line_num} ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)})") from error


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".jsonl.gz": _json_rows,
    ".json.gz": _json_rows,
    ".csv.gz": _csv_rows,
    ".parquet": _parquet_rows,
}


def _reader(path: Path) -> Callable[[Path], Iterator[Any]] | None:
    return next((reader for suffix, reader in _READERS.items() if path.name.lower().endswith(suffix)), None)


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", type(None): "null", int: "a number", float: "a number"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _hub_rows(name: str, split: str, stream: bool) -> Iterator[Row]:
    import datasets

    repository, _, configuration = name.partition(":")
    options: dict[str, Any] = {"split": split, **({"streaming": True} if stream else {})}
    empty = True
    try:
        try:
            rows = datasets.load_dataset(repository, configuration or None, **options)
        except ValueError as error:
            if not configuration or "BuilderConfig" not in str(error):
                raise
            rows = datasets.load_dataset(repository, data_dir=configuration, **options)
        for row in rows:
            empty = False
            yield row
    except Exception as error:  # the client's failures share no base class
        raise UserError(_hub_failure(name, error)) from error
    if empty:
        raise UserError(f"{name} [{split}] is empty; expected at least one row")


def _hub_failure(name: str, error: Exception) -> str:
    hints = {
        "gated": "ask for access on its page and log in with `hf auth login`",
        "offline": "it is not in the local cache and the hub cannot be reached; give a local file",
        "connect": "the hub cannot be reached; give a local file",
        "doesn't exist": "no local file and no hub data set has this name",
    }
    hint = next((hint for word, hint in hints.items() if word in f"{type(error).__name__} {error}".lower()), "")
    return f"cannot load the data set {name}: {first_line(error)}" + (f" ({hint})" if hint else "")
