"""No output is an input, whatever it is called, and a folder has one writer."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from shapo.errors import UserError
from shapo.storage.outputs import check_outputs, locked, parts, sole_writer


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


def test_an_unwritable_folder_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write"), locked(folder):
            pass


def test_a_file_has_one_writer_and_its_lock_leaves_nothing(tmp_path):
    output = tmp_path / "deep" / "o.json"
    with (
        sole_writer(output),
        pytest.raises(UserError, match=r"another run is writing to .*o\.json"),
        sole_writer(output),
    ):
        pass
    assert not list(tmp_path.iterdir())
    with sole_writer(tmp_path / "a"), sole_writer(tmp_path / "b"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = f"""
import os
from pathlib import Path
from shapo.storage.outputs import sole_writer
with sole_writer(Path({str(tmp_path / "o.json")!r})):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with sole_writer(tmp_path / "o.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_workers_of_one_command_share_a_folder_that_others_may_not_have(tmp_path):
    run = tmp_path / "run"
    with (
        locked(run, shared=True),
        locked(run, shared=True),
        pytest.raises(UserError, match="another run is writing to"),
        locked(run),
    ):
        pass


def test_the_base_of_an_adapter_is_read_too(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tmp_path / "base"}"}}')
    with pytest.raises(UserError, match=r"--output would overwrite .*base, which the adapter of --model reads"):
        check_outputs([("--output", tmp_path / "base")], [("--model", tmp_path / "adapter")])


def test_a_file_that_a_folder_links_to_is_part_of_it(tmp_path):
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert refused(tmp_path / "blob", tmp_path / "model")


def test_names_with_wildcards_are_what_is_there(tmp_path):
    for name in ("checkpoint.pt", "checkpoint-2.pt", "other"):
        (tmp_path / name).write_text("")
    found = parts(tmp_path, ("model", "checkpoint*.pt"))
    assert [path.name for path in found] == ["model", "checkpoint-2.pt", "checkpoint.pt"]


def test_a_device_is_no_output(tmp_path):
    with pytest.raises(UserError, match="it is a device or a pipe"):
        check_outputs([("--output", type(tmp_path)("/dev/full"))], [])
