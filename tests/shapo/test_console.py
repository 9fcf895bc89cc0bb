"""A standard output that takes nothing costs no result."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from shapo.cli import main
from shapo.console import LastingStream, lasting_streams
from shapo.training.metrics import MetricsLog


@pytest.fixture
def sft(tmp_path, monkeypatch, _tiny_llama, tiny_tokenizer, synthetic_rows):
    """A run of one update, as arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    _tiny_llama.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows["train"][:4]))
    line = "sft --model model --data data.jsonl --output out --max-length 64 --updates 1 --batch-size 2 --warmup 1"
    return [*line.split(), "--quiet"]


def gone():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def is_whole(folder):
    return all((folder / name).exists() for name in ("model/model.safetensors", "run.json", "recipe.yaml"))


def test_a_reader_that_leaves_costs_no_result(sft, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", gone())
    assert main(sft) == 1
    assert is_whole(tmp_path / "out")
    assert "error" not in capsys.readouterr().err


def test_a_full_output_is_reported_once_everything_is_saved(sft, tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(sft) == 2
    error = capsys.readouterr().err
    assert "shapo: error: cannot write to the standard output: No space left on device; every file" in error
    assert is_whole(tmp_path / "out")


def test_an_error_output_that_takes_nothing_ends_no_run(sft, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", gone())
    assert main([part for part in sft if part != "--quiet"]) == 0
    assert is_whole(tmp_path / "out")


@pytest.mark.slow
def test_closed_outputs_lose_nothing_and_no_file_takes_their_place(sft, tmp_path):
    line = " ".join([sys.executable, "-m", "shapo", *sft])
    assert subprocess.run(f"{line} >&- 2>&- <&-", shell=True, check=False).returncode == 0
    assert is_whole(tmp_path / "out")
    assert all(json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())


def test_metrics_on_a_device_are_refused_before_the_training(sft, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").symlink_to("/dev/full")
    assert main([*sft, "--overwrite"]) == 2
    assert "metrics.jsonl: it is a device or a pipe" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_at_the_last_line_of_the_metrics_costs_no_model(sft, tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, _):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    before = MetricsLog.__init__

    def full(self, *arguments, **more):
        before(self, *arguments, **more)
        self._file = Full(self._file)

    monkeypatch.setattr(MetricsLog, "__init__", full)
    assert main(sft) == 2
    assert "metrics.jsonl: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_what_a_stream_cannot_take_is_kept_as_its_failure():
    stream = LastingStream(gone())
    for _ in range(3):
        assert stream.write("x") == 1
        stream.flush()
    assert isinstance(stream.failure, BrokenPipeError)
    before = sys.stdout, sys.stderr
    with lasting_streams() as output:
        assert (sys.stdout, output.failure) == (output, None)
    assert (sys.stdout, sys.stderr) == before
