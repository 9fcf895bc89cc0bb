"""The study's queue from end to end on a tiny model, with a worker killed in the middle of a training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shapo.study.report import write_report
from tests.support.tiny_study import JOBS, TIMES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def found(folder):
    command = [sys.executable, "-m", "tests.support.tiny_study", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_kill_came_in_the_middle(found):
    assert "probe.json" in found["before"]
    assert 0 < len(found["before"]) < len(JOBS)


def test_finished_rows_outlive_the_kill(found):
    assert found["kept"]


def test_every_job_is_done_once_by_one_of_the_workers(found):
    assert sorted(found["done"]) == sorted(JOBS)


def test_the_rows_are_those_of_an_undisturbed_study(found):
    assert sorted(found["disturbed"]) == sorted(JOBS)
    for name, row in found["undisturbed"].items():
        other = found["disturbed"][name]
        assert {k: v for k, v in other.items() if k not in TIMES} == {k: v for k, v in row.items() if k not in TIMES}


def test_no_job_failed(found):
    assert not [row["trace"] for row in found["disturbed"].values() if "error" in row]


def test_temporary_files_of_training_are_gone_but_for_the_killed_ones(found, folder):
    assert len(list((folder / "disturbed" / "work").iterdir())) == 1
    assert not list((folder / "undisturbed" / "work").glob("*"))


def test_nothing_of_the_texts_is_in_a_row(found, folder):
    rows = (folder / "pairs" / "selection.jsonl").read_text().splitlines()
    text = json.dumps(found["disturbed"])
    assert not [row for row in map(json.loads, rows) if row["prompt"] in text or row["response_0"] in text]


def test_the_report_names_the_jobs_that_were_not_run(found, folder):
    text = write_report(folder / "disturbed").read_text()
    assert "| gradient-10 |" in text
    assert "`shapo-all-noise0.4-seed0`" in text.split("## Not run")[1]
    assert "`probe`" not in text.split("## Not run")[1]
