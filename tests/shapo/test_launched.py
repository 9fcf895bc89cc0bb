"""Commands on ranks: they leave what one process leaves, rank 0 alone prints, and they end together in one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shapo.training.metrics import read_metrics
from shapo_kernels import Subspace

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "support" / "launched_runs.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}

ENDS = ("shapo: error: ", "shapo: interrupted")


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError(f"{path} was never written")


def ranks_of(pid):
    """The processes that a launcher has started, in the order of their ranks."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (entry / "environ").read_bytes().split(b"\0")
                rank = next((v for v in variables if v.startswith(b"RANK=")), None)
                if parent == pid and rank is not None:
                    found[int(rank[5:])] = int(entry.name)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("launched")
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(found)], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return found


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def lines_of(run):
    """What the ranks say of their end; without a traceback."""
    text = "".join(run["err"])
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith(ENDS)]


@pytest.mark.parametrize("name", ["train", "sft", "probe", "select", "evaluate"])
def test_rank_0_alone_prints_what_one_process_prints(name, report, folder):
    assert report[f"{name} alone"] == 0
    assert report[name]["codes"] == [0, 0]
    assert report[name]["out"][0].replace("-ranks", "-alone") == (folder / f"{name}.alone").read_text()
    assert report[name]["out"][1] == report[name]["err"][1] == ""


@pytest.mark.parametrize("name", ["train", "sft"])
def test_a_launched_run_saves_the_model_of_one_process(name, report, folder):
    alone, ranks = (load_file(folder / f"{name}-{kind}" / "model" / "model.safetensors") for kind in ("alone", "ranks"))
    start = load_file(folder / "model" / "model.safetensors")
    assert alone.keys() == ranks.keys()
    for weight, value in alone.items():
        torch.testing.assert_close(ranks[weight], value, rtol=1e-6, atol=1e-6)
    assert any((alone[weight] - start[weight]).abs().max() > 1e-4 for weight in alone)
    names = [sorted(path.name for path in (folder / f"{name}-{kind}").iterdir()) for kind in ("alone", "ranks")]
    assert names[0] == names[1]


def test_a_launcher_of_one_rank_starts_one_process(report, folder):
    assert report["one rank"]["codes"] == [0]
    assert "one process trains without FSDP" in report["one rank"]["err"][0]
    alone, rank = (load_file(folder / name / "model" / "model.safetensors") for name in ("train-alone", "one rank"))
    assert all(torch.equal(value, rank[name]) for name, value in alone.items())


def test_a_launched_probe_selection_and_evaluation_are_those_of_one_process(report, folder):
    features = [load_file(folder / f"probe-{kind}" / "features.safetensors")["features"] for kind in ("alone", "ranks")]
    torch.testing.assert_close(features[1], features[0], rtol=1e-5, atol=1e-6)
    alone, ranks = (Subspace.load(folder / f"select-{kind}") for kind in ("alone", "ranks"))
    assert alone.names == ranks.names
    assert all(torch.equal(alone[name], ranks[name]) for name in alone.names)
    assert (folder / "answers-alone.jsonl").read_text() == (folder / "answers-ranks.jsonl").read_text()
    measured = [json.loads((folder / f"evaluate-{kind}").read_text())["preferences"] for kind in ("alone", "ranks")]
    assert measured[0]["accuracy"] == measured[1]["accuracy"]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["interrupted", "interrupted twice at once"])
def test_an_interrupt_of_one_rank_saves_and_ends_all(name, report, folder):
    run = report[name]
    assert run["codes"][0] == 130
    assert run["codes"][1] in (130, 143), "itself, or by the launcher's SIGTERM"
    assert run["seconds"] < 10
    checkpoint = folder / name / "checkpoint.pt"
    assert lines_of(run) == [f"shapo: interrupted: update 3 of 5 is saved in {checkpoint}; --resume goes on from there"]
    assert torch.load(checkpoint, weights_only=True)["update"] == 3
    assert not (folder / name / "model").exists()


def test_an_interrupted_launch_goes_on_to_the_bits_of_one_that_was_not(report, folder):
    assert report["resumed"]["codes"] == [0, 0]
    whole, parts = (load_file(folder / name / "model" / "model.safetensors") for name in ("train-ranks", "resumed"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    updates = [row["update"] for row in read_metrics(folder / "resumed" / "metrics.jsonl", "update")]
    assert updates == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("killed", "shapo: error: another rank was lost"),
        ("out of memory", "shapo: error: out of memory"),
        ("full disk", "shapo: error: cannot write .*checkpoint.pt: "),
        ("no such file", "shapo: error: no such file: nowhere.jsonl"),
        ("there already", "shapo: error: .* already holds a run"),
        ("misspelt", "shapo: error: .*--modle|shapo: error: the following arguments are required"),
        ("four bits", "shapo: error: --qlora runs in one process; on several ranks use --lora"),
        ("alone only", "shapo: error: shapo data runs in one process: start it without the launcher"),
    ],
)
def test_one_ranks_end_gives_one_line_and_ends_all(name, message, report):
    (line,) = lines_of(report[name])
    assert re.match(message, line)
    assert 0 not in report[name]["codes"]
    assert report[name]["seconds"] < 10


@pytest.mark.parametrize("name", ["killed", "out of memory", "mistaken", "full disk"])
def test_a_lost_rank_leaves_the_last_checkpoint_whole(name, report, folder):
    state = torch.load(folder / name / "checkpoint.pt", weights_only=True)
    assert state["update"] == 2
    assert not [path for path in (folder / name).iterdir() if path.name.startswith(".shapo")]


def test_a_mistake_in_the_program_is_one_traceback(report):
    text = "".join(report["mistaken"]["err"])
    assert text.count("Traceback") == 1
    assert text.rstrip().endswith("KeyError: 'mine'")
    assert report["mistaken"]["seconds"] < 10


@pytest.mark.parametrize("launcher", ["torchrun", "fsdp2", "zero3"])
def test_the_launchers_themselves_start_it_and_end_it(launcher, folder, tmp_path):
    """One real start each: of DDP, which is killed, and by the shipped configurations."""
    if launcher == "zero3":
        pytest.importorskip("deepspeed")
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        file = ROOT / "recipes" / "accelerate" / f"{launcher}.yaml"
        start = ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
        start += ["--main_process_port", "0"]
    train = ["train", "--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--quiet"]
    train += ["--max-length", "96", "--max-prompt-length", "64", "--batch-size", "5", "--warmup", "0", "--lr", "0.05"]
    train += ["--optimizer", "sgd", "--updates", "5000" if launcher == "torchrun" else "3", "--save-every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", *start, "-m", "shapo", *train, "--output", str(tmp_path / "run")],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    if launcher == "torchrun":
        wait_for(tmp_path / "run" / "checkpoint.pt", process)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, error = process.communicate(timeout=150)
    said = [line for line in error.splitlines() if line.startswith(ENDS)]
    if launcher == "torchrun":
        assert process.returncode != 0
        assert len(said) == 1, error
        assert "another rank was lost" in said[0]
        assert "python/shapo" not in error
        assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["update"] >= 1
    else:
        assert process.returncode == 0, error[-4000:]
        assert said == []
        assert "architectures" in json.loads((tmp_path / "run" / "model" / "config.json").read_text())
        saved, start = (load_file(path / "model" / "model.safetensors") for path in (tmp_path / "run", folder))
        assert saved.keys() == start.keys()
        assert not torch.equal(saved["lm_head.weight"], start["lm_head.weight"])
