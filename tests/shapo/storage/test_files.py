"""Artefacts appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import pytest

from shapo.errors import UserError
from shapo.storage.files import atomic_file, atomic_folder, require_writable, write_json


def test_a_file_is_replaced_in_one_step_and_an_exception_leaves_the_old_one(tmp_path):
    path = tmp_path / "a" / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(TypeError), atomic_file(path) as temporary:
        temporary.write_bytes("two")
    assert path.read_text() == "one"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_folder_is_replaced_whole_and_an_exception_leaves_the_old_one(tmp_path):
    path = tmp_path / "model"
    for text in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / text).write_text(text)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        _write_and_be_interrupted(temporary / "three")
    assert [entry.name for entry in path.iterdir()] == ["two"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_operating_system_errors_become_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"), atomic_file(tmp_path / "file" / "below"):
        pass
    with pytest.raises(UserError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass


def test_numbers_that_json_lacks_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"nan": math.nan, "nested": [{"inf": -math.inf}], "tuple": (1.5, "é")})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "nan": None,
        "nested": [{"inf": None}],
        "tuple": [1.5, "é"],
    }


def test_writability_is_found_out_without_leaving_anything(tmp_path):
    require_writable(tmp_path / "new" / "deep", folder=True)
    require_writable(tmp_path / "new" / "file.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path, folder in ((tmp_path / "file", True), (tmp_path, False), (tmp_path / "file" / "x", False)):
        with pytest.raises(UserError, match="cannot write"):
            require_writable(path, folder=folder)


def _write_and_be_interrupted(path):
    path.write_text("thr")
    raise KeyboardInterrupt


def test_a_file_is_as_readable_as_any_other_whoever_writes_it(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "other").write_text("")
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def leave(folder, *, process, host=None, ending="tmp", age=0.0):
    """What a killed run leaves: a file under the temporary name of a process."""
    with atomic_file(folder / "x") as temporary:
        ours = temporary.name
    path = folder / f".shapo-{host or ours.split('-')[1]}-{process}-0123abcd.{ending}"
    path.write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("process", ["dead", "an earlier one of our number"])
def test_what_a_killed_run_left_is_removed_and_in_nobodys_way(process, tmp_path):
    left = leave(tmp_path, process=dead_process() if process == "dead" else os.getpid())
    (tmp_path / f".model.{os.getpid()}.tmp").mkdir()  # a name that can be guessed blocks nobody
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("a")
    assert not left.exists()
    assert (tmp_path / "model" / "a").read_text() == "a"


def test_what_another_process_is_writing_stays(tmp_path):
    running = leave(tmp_path, process=os.getppid())
    elsewhere = leave(tmp_path, process=dead_process(), host="00000000")
    forgotten = leave(tmp_path, process=1, host="11111111", age=2 * 24 * 3600)
    with atomic_file(tmp_path / "a"), atomic_file(tmp_path / "b") as inner:
        inner.write_text("b")
    assert running.exists()
    assert elsewhere.exists()
    assert not forgotten.exists()
    assert (tmp_path / "b").read_text() == "b"


def test_a_kill_between_the_two_renames_loses_no_old_version(tmp_path):
    leave(tmp_path, process=dead_process(), ending="model.old")
    with atomic_file(tmp_path / "a"):
        pass
    assert (tmp_path / "model").read_text() == "half"


def test_links_are_replaced_and_never_followed(tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "kept").write_text("kept")
    (tmp_path / "model").symlink_to(tmp_path / "else")
    (tmp_path / "file").symlink_to(tmp_path / "else" / "kept")
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("a")
    write_json(tmp_path / "file", {})
    assert (tmp_path / "else" / "kept").read_text() == "kept"
    assert not (tmp_path / "model").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "file", "model"]
