"""The GPU runner, dry-run on the CPU: its steps, its rows, and that what is wrong is neither hidden nor timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report, rows
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import logps, model, subspace
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.suites import SUITES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_dry_run_leaves_steps_and_rows_that_the_report_can_render(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert {step["status"] for step in steps} == {"passed"}
    suites = {f"time {suite.__name__}" for suite in SUITES}
    assert len(suites) == 6
    assert suites <= {step["step"] for step in steps}
    found = sorted(path.name for path in tmp_path.glob("dry_run_*.json"))
    names = (
        "column_cosine",
        "delta_forward",
        "linear_sequence_logps",
        "neurons",
        "sequence_logps",
        "subspace_update",
    )
    assert found == [f"dry_run_gpu_{name}.json" for name in names]
    for path in tmp_path.glob("dry_run_*.json"):
        recorded = json.loads(path.read_text())
        assert recorded["environment"]["commit"]
        for row in recorded["rows"]:
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert {"dtype", "shape", "times_ours", "copy_gb_per_s"} <= set(row)
            bounded = "delta" not in path.name and "linear" not in path.name  # by the memory that must be moved
            assert bounded <= ({"bytes", "gb_per_s", "percent_of_peak"} <= set(row))
        ours = "delta, " if "delta" in path.name else "shapo_kernels, "
        assert ours in report.render(path.stem, recorded["rows"], recorded["environment"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_runner_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        runner.main(["--output", str(tmp_path)])
    assert exit.value.code == 2
    assert "use --dry-run" in capsys.readouterr().err


def bench():
    return Bench(torch.device("cpu"), small=True, rounds=2, deadline=float("inf"))


def wrong():
    raise AssertionError("the result is wrong")


def test_a_variant_whose_check_fails_is_refused_and_not_timed():
    calls = []
    found = bench()
    found.compare(
        "suite",
        "case",
        {"ours": (lambda: None, lambda: None), "baseline": (lambda: calls.append(1), wrong)},
        "ours",
    )
    assert [(row["variant"], "refused" in row) for row in found.rows] == [("baseline", True), ("ours", False)]
    assert "the result is wrong" in found.rows[0]["refused"]
    assert not calls


def test_where_our_own_check_fails_nothing_is_timed():
    found = bench()
    found.compare("suite", "case", {"ours": (wrong, wrong), "baseline": (lambda: None, lambda: None)}, "ours")
    assert [row["variant"] for row in found.rows] == ["ours"]
    assert "p50_ms" not in found.rows[0]


def test_the_check_of_an_update_notices_a_wrong_step_and_weights_that_stay_perturbed():
    problem = subspace.Update(bench(), torch.float32)

    def far():
        for weight in problem.weights:
            weight.add_(1)
        problem.perturbed = [w[:, i].clone() for w, i in zip(problem.weights, problem.indices, strict=True)]

    with pytest.raises(AssertionError, match=r"not at theta \+ eps"):
        problem.check(far, exact=True)()
    for weight, old in zip(problem.weights, problem.original, strict=True):
        weight.copy_(old)
    right = problem.indexed()

    def unrestored():
        right()
        problem.weights[0][0, 0] += 1

    with pytest.raises(AssertionError, match="not restored"):
        problem.check(unrestored, exact=True)()


def test_the_check_of_a_delta_forward_notices_a_model_that_is_not_moved_or_moved_elsewhere():
    torch.manual_seed(0)
    before, change = torch.randn(8, 4), torch.randn(8, 4)
    model._moves_as(lambda: before + 1.01 * change, before, change)()
    for wrong in (before, before + 2 * change, before - change, before + torch.randn(8, 4)):
        with pytest.raises(AssertionError, match="outputs move with cosine"):
            model._moves_as(lambda wrong=wrong: wrong, before, change)()


def test_the_check_of_log_probabilities_notices_a_wrong_gradient():
    truth = (torch.randn(3), torch.randn(3, 4).double())
    logps._agrees(lambda: (truth[0], truth[1].float()), truth, 1e-5)()
    with pytest.raises(AssertionError, match="result 1 is wrong"):
        logps._agrees(lambda: (truth[0], 1.1 * truth[1]), truth, 1e-5)()
    with pytest.raises(AssertionError, match="result 0 is wrong"):
        logps._agrees(lambda: (torch.full((3,), torch.nan), truth[1]), truth, 1e-5)()


def test_a_failed_step_is_recorded_and_the_run_goes_on(tmp_path):
    steps = runner.Steps(tmp_path, budget=60)
    with steps.step("breaks"):
        raise ValueError("why")
    with steps.step("a command"):
        steps.command("fails", [sys.executable, "-c", "print('seen'); raise SystemExit(3)"], 30)
    with steps.step("works"):
        pass
    recorded = json.loads((tmp_path / "steps.json").read_text())
    assert [entry["status"] for entry in recorded] == ["failed", "failed", "passed"]
    assert recorded[0]["reason"] == "ValueError: why"
    assert "exit code 3" in recorded[1]["reason"]
    assert (tmp_path / "fails.log").read_text() == "seen\n"


def test_rows_of_one_case_are_added_to_those_of_others_from_the_same_machine_alone(tmp_path):
    def record(case, milliseconds):
        return rows.row("suite", case, report.OURS, [milliseconds / 1e3] * 3, times_ours=1.0)

    path = rows.add("suite", [record("one", 1.0)], tmp_path)
    rows.add("suite", [record("two", 2.0)], tmp_path)
    rows.add("suite", [record("one", 3.0)], tmp_path)
    recorded = json.loads(path.read_text())
    assert [(row["case"], round(row["p50_ms"])) for row in recorded["rows"]] == [("one", 3), ("two", 2)]
    table = report.render_wide("suite", recorded["rows"], recorded["environment"])
    assert "| two | 2.0 (2.0 to 2.0) |" in table
    path.write_text(json.dumps(recorded | {"environment": recorded["environment"] | {"cpu": "another"}}))
    rows.add("suite", [record("three", 1.0)], tmp_path)
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["three"]
