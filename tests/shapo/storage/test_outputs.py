"""No output is an input, whatever it is called, and a folder has one writer."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from shapo.errors import UserError
from shapo.storage.outputs import check_outputs, locked


def refused(output, read):
    with contextlib.suppress(UserError):
        check_outputs([("--output", output)], [("--data", read)])
        return False
    with pytest.raises(UserError, match=r"--output would overwrite .*--data"):
        check_outputs([("--output", output)], [("--data", read)])
    return True


def test_an_output_is_no_input_under_any_name(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("x")
    os.link(data, tmp_path / "hard")
    os.symlink(data, tmp_path / "soft")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("data.jsonl", "hard", "soft", "folder/../data.jsonl", str(data)):
        assert refused(type(data)(name), data), name
        assert refused(data, type(data)(name)), name
    assert not refused(tmp_path / "other.jsonl", data)
    assert not refused(data, type(data)("owner/hub-name"))


def test_an_output_is_no_part_of_an_input_and_holds_none(tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert refused(model, model / "config.json")
    assert refused(model / "config.json", model)
    assert refused(tmp_path / "run", model)
    assert not refused(model / "new.json", model)
    assert not refused(tmp_path / "run" / "metrics.jsonl", model)


def test_two_outputs_are_two_files(tmp_path):
    with pytest.raises(UserError, match="--output and --answers name the same file"):
        check_outputs([("--output", tmp_path / "a"), ("--answers", tmp_path / "." / "a")], [])


def test_a_folder_has_one_writer_and_is_left_as_it_was_found(tmp_path):
    folder = tmp_path / "deep" / "run"
    code = f"""
from pathlib import Path
from shapo.errors import UserError
from shapo.storage.outputs import locked
try:
    with locked(Path({str(folder)!r})):
        print("free")
except UserError as error:
    print(error)
"""

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with locked(folder):
        assert "another run is writing to" in other()
    assert other() == "free\n"
    assert not list(tmp_path.iterdir())
    with locked(folder):
        (folder / "kept").write_text("")
    assert (folder / "kept").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write"), locked(folder):
            pass
