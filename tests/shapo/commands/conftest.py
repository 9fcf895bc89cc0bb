"""A folder of models and data, and a way to run commands on it."""

from __future__ import annotations

import gzip
import json

import pytest

from shapo.cli import main
from shapo_kernels import Subspace
from tests.support.commands import DOWN


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tiny_llama, tiny_tokenizer, synthetic_rows):
    """A saved model, data files in several states, and a subspace."""
    folder = tmp_path_factory.mktemp("files")
    _tiny_llama.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    _tiny_llama.save_pretrained(folder / "bare")
    for split, rows in synthetic_rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "columns.jsonl").write_text('{"text": "a"}\n')
    whole = gzip.compress((folder / "train.jsonl").read_bytes())
    (folder / "truncated.jsonl.gz").write_bytes(whole[: len(whole) // 8])
    Subspace({DOWN: [1, 2, 30]}).save(folder / "subspace.safetensors")
    return folder


@pytest.fixture
def shapo(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; gives the exit code, stdout, and stderr without the hint at the template."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        told = [line for line in captured.err.splitlines(keepends=True) if "has a chat template" not in line]
        return code, captured.out, "".join(told)

    return run
