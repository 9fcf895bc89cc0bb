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


def test_every_example_is_run_by_a_test():
    # torchrun_fsdp2.py: tests/distributed/test_checkpoint.py
    here = {"plain_pytorch.py", "accelerate_loop.py", "accelerate_accumulate.py", "hf_trainer.py", "trl_dpo.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == here | {"torchrun_fsdp2.py"}
