"""`python -m benchmarks.gpu`: its steps, dry-run on the CPU, and what becomes of one that fails, hangs or dies."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import checks, families, record, steps, whole_checks
from benchmarks.gpu.processes import run_apart
from benchmarks.gpu.suites import PUBLISHED, SUITES, THROUGH_THE_HOST

ROOT = Path(__file__).parents[2]


def a_run(folder, seconds=60.0):
    return steps.Run(folder, True, 2, time.monotonic() + seconds)


def statuses(folder):
    return {e["step"]: e["status"] for e in record.read(folder / "steps.jsonl") if "check" not in e}


# -- the plan


def test_what_may_hang_or_take_long_comes_after_the_timings_of_the_first_backend():
    names = [step.name for step in steps.plan(steps.Run(Path(), False, 1, 0.0))]
    kinds = [
        "check subspace, default", "time subspace_update", "check subspace, triton", "time subspace_update, the rest",
        "check compiled, default", "time through_the_host", "pytest", "memcheck, default", "racecheck, triton",
    ]  # fmt: skip
    assert [names.index(kind) for kind in kinds] == sorted(names.index(kind) for kind in kinds)
    assert names[-1] == kinds[-1]
    assert len(set(names)) == len(names)


def test_every_check_belongs_to_a_family_and_every_family_has_its_step():
    known = {check for family in families.FAMILIES.values() for check in family}
    written = {
        function
        for module in (checks, whole_checks)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if list(inspect.signature(function).parameters) == ["device"] and not name.startswith("_")
    }
    assert written == known
    assert set(steps.EARLY) | set(steps.LATE) == set(families.FAMILIES)
    assert set(steps.OTHER) < set(steps.EARLY)
    assert set(families.ANYWHERE) | set(checks.ON_GPU) == known


def test_every_suite_is_there_and_needs_families_that_are_checked_before_it():
    for suite in (*SUITES, THROUGH_THE_HOST, PUBLISHED):
        assert callable(suite.function())
        assert set(suite.needs) <= set(steps.EARLY)


def test_the_parent_of_the_steps_imports_nothing_that_could_touch_cuda():
    code = (
        "import sys; from benchmarks.gpu.__main__ import main; main(['--list']); "
        "assert not {'shapo_kernels', 'transformers', 'triton'} & set(sys.modules); "
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# -- processes


def test_what_a_function_prints_is_kept_and_what_it_raises_is_said(tmp_path):
    log = tmp_path / "log"

    def works():
        print("here")

    def fails():
        os.write(2, b"before it fell\n")
        raise ValueError("why")

    assert run_apart(works, 30, log) is None
    assert run_apart(fails, 30, log) == "ValueError: why"
    assert run_apart(lambda: os.kill(os.getpid(), signal.SIGTERM), 30, log) == "ended by signal 15"
    assert run_apart(lambda: os._exit(3), 30, log) == "exit code 3"
    text = log.read_text()
    assert text.startswith("here\nbefore it fell\n")
    assert "Traceback" in text


@pytest.mark.parametrize("hangs", [True, False])
def test_descendants_are_ended_with_their_step(tmp_path, hangs):
    pid_file = tmp_path / "pid"

    def starts_another():
        child = subprocess.Popen(["sleep", "600"])
        pid_file.write_text(str(child.pid))
        if hangs:
            child.wait()

    start = time.monotonic()
    reason = run_apart(starts_another, 1.0, tmp_path / "log")
    assert reason == ("ended after 1 s" if hangs else None)
    assert time.monotonic() - start < 20
    assert is_gone(int(pid_file.read_text()))


def is_gone(pid):
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# -- going through the steps


def go_through(monkeypatch, run, *planned, only=()):
    monkeypatch.setattr(runner, "plan", lambda run: planned)
    return runner.go_through(run, only)


def seen(run, healthy):
    run.append("seen.jsonl", {"healthy": list(healthy)})


def wrong(run, healthy):
    raise AssertionError("wrong")


def nothing(run, healthy):
    pass


def test_a_failed_step_fails_the_run_and_the_others_go_on(monkeypatch, tmp_path):
    run = a_run(tmp_path)
    planned = [
        steps.Step("one", wrong, 10),
        steps.Step("two", lambda *_: os._exit(9), 10),
        steps.Step("three", seen, 10),
    ]
    assert go_through(monkeypatch, run, *planned) == ["one", "two"]
    assert statuses(tmp_path) == {"one": "failed", "two": "failed", "three": "passed"}


def test_a_backend_that_failed_its_checks_is_not_timed(monkeypatch, tmp_path):
    def check(backend, work):
        return steps.Step(f"check a, {backend}", work, 10, backend=backend, families=("a",))

    run = a_run(tmp_path)
    planned = [
        check("default", wrong),
        steps.Step("time early", seen, 10, families=("a",)),
        check("reference", nothing),
        steps.Step("time late", seen, 10, families=("a",), later=True),
        steps.Step("time other", seen, 10, families=("b",), later=True),
    ]
    go_through(monkeypatch, run, *planned)
    assert [e["healthy"] for e in record.read(tmp_path / "seen.jsonl")] == [[], ["reference"], []]


def test_where_no_time_is_left_a_step_is_not_begun(monkeypatch, tmp_path):
    run = a_run(tmp_path, seconds=3.0)
    assert (
        go_through(monkeypatch, run, steps.Step("long", seen, 10, least=5.0), steps.Step("short", seen, 10, least=1))
        == []
    )
    assert statuses(tmp_path) == {"long": "skipped", "short": "passed"}


def test_only_some_steps_run_where_words_are_given(monkeypatch, tmp_path):
    planned = [steps.Step(name, nothing, 10) for name in ("device", "time cosine", "time head")]
    go_through(monkeypatch, a_run(tmp_path), *planned, only=["head"])
    assert list(statuses(tmp_path)) == ["device", "time head"]


def test_a_machine_without_a_gpu_ends_the_run_at_once(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert runner.main(["--output", str(tmp_path)]) == 1
    assert statuses(tmp_path) == {"device": "failed"}
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_goes_through_every_step_and_leaves_rows_that_the_report_can_render(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--budget", "800", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "log.txt").read_text()[-4000:]
    planned = [step.name for step in steps.plan(a_run(tmp_path))]
    found = statuses(tmp_path)
    assert list(found) == planned
    device_only = {f"check {family}, {name}" for family in ("streams", "large") for name in ("default", "reference")}
    device_only |= {"build", "check compiled, reference"}
    assert {name for name, status in found.items() if status == "skipped"} == device_only
    rows = record.read(tmp_path / "rows.jsonl")
    assert {row["suite"] for row in rows} == set(report.GPU)
    assert not [row for row in rows if "p50_ms" not in row]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["commit"]
    for row in rows:
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert {"dtype", "timing"} <= set(row)
    for suite in report.GPU:
        mine = [row for row in rows if row["suite"] == suite]
        assert "shapo_kernels" in report.render(suite, mine, environment)
        bounded = suite not in ("gpu_delta_forward", "gpu_linear_sequence_logps", "gpu_updates")
        for row in mine:
            assert bounded == ({"bytes", "gb_per_s", "percent_of_copy", "of_floor"} <= set(row))
    for case in {row["case"] for row in rows}:
        names = [row["variant"] for row in rows if row["case"] == case]
        assert len(names) == len(set(names)), f"{case}: a variant has two rows"


# -- recording


def leave(folder, rows, **environment):
    facts = {"commit": "abc1234", "gpu": "NVIDIA H200", "cpu": "a CPU", "dry_run": False, "date": "2026-01-02"}
    (folder / "environment.json").write_text(json.dumps(facts | environment))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"suite": "gpu_cut off')
    return folder


def a_row(suite, case, variant, **columns):
    return {"suite": suite, "case": case, "variant": variant, **columns}


def test_rows_of_a_run_are_recorded_case_by_case_without_suites_in_which_ours_was_wrong(tmp_path, capsys):
    ours = "shapo_kernels"
    leave(tmp_path, [
        a_row("gpu_a", "one", ours, p50_ms=1.0), a_row("gpu_a", "two", ours, p50_ms=2.0),
        a_row("gpu_a", "two", "Liger", refused="cannot"), a_row("gpu_b", "one", ours, refused="wrong"),
        a_row("gpu_b", "one", "eager", p50_ms=3.0), a_row("gpu_a", "one", "compiled", p50_ms=4.0),
    ])  # fmt: skip
    (path,) = record.record(tmp_path, tmp_path / "results")
    recorded = json.loads(path.read_text())
    assert path.name == "gpu_a.json"
    assert [(r["case"], r["variant"]) for r in recorded["rows"]] == [("one", ours), ("one", "compiled"), ("two", ours)]
    assert recorded["environment"]["gpu"] == "NVIDIA H200"
    assert "gpu_b is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "facts", [{"dry_run": True}, {"gpu": None}, {"commit": "unknown"}, {"commit": "abc1234-dirty"}]
)
def test_a_dry_run_or_one_of_an_unknown_commit_is_not_recorded(tmp_path, facts):
    leave(tmp_path, [a_row("gpu_a", "one", "shapo_kernels", p50_ms=1.0)], **facts)
    with pytest.raises(ValueError, match=r"dry run|commit"):
        record.record(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()
