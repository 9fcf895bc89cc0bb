"""The queue of a study, with jobs that do next to nothing."""

import fcntl
import json

import pytest

from shapo.errors import UserError
from shapo.study.queue import Job, read_rows, run_queue


def quiet(line):
    pass


def test_jobs_run_in_order_once_their_needs_are_there(tmp_path):
    seen = []

    def work(job, needs):
        seen.append((job.name, sorted(needs)))
        return {"value": sum(row["value"] for row in needs.values()) + 1}

    jobs = [Job("c", "k", needs=("a", "b")), Job("a", "k"), Job("b", "k", needs=("a",))]
    assert run_queue(jobs, tmp_path, work, log=quiet) == 3
    assert seen == [("a", []), ("b", ["a"]), ("c", ["a", "b"])]
    assert read_rows(tmp_path)["c"]["value"] == 4


def test_a_job_with_a_row_is_not_done_again(tmp_path):
    jobs = [Job("a", "k"), Job("b", "k")]
    assert run_queue(jobs[:1], tmp_path, lambda job, needs: {"by": 1}, log=quiet) == 1
    assert run_queue(jobs, tmp_path, lambda job, needs: {"by": 2}, log=quiet) == 1
    assert [row["by"] for row in read_rows(tmp_path).values()] == [1, 2]


def test_a_failed_job_is_recorded_and_tried_again_by_the_next_call(tmp_path):
    def fail(job, needs):
        if job.name == "a":
            raise ValueError("no luck")
        return {}

    jobs = [Job("a", "k"), Job("b", "k"), Job("c", "k", needs=("a",))]
    assert run_queue(jobs, tmp_path, fail, log=quiet) == 1
    assert read_rows(tmp_path)["a"]["error"] == "ValueError: no luck"
    assert "c" not in read_rows(tmp_path)
    assert run_queue(jobs, tmp_path, lambda job, needs: {}, log=quiet) == 2
    assert "error" not in read_rows(tmp_path)["a"]


def test_a_job_that_another_process_holds_is_passed_over(tmp_path):
    (tmp_path / "locks").mkdir()
    with open(tmp_path / "locks" / "a", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_queue([Job("a", "k"), Job("b", "k")], tmp_path, lambda job, needs: {}, log=quiet) == 1
    assert list(read_rows(tmp_path)) == ["b"]


def test_no_job_is_begun_after_the_time_is_up(tmp_path):
    assert run_queue([Job("a", "k")], tmp_path, lambda job, needs: {}, until=0.0, log=quiet) == 0


def test_rows_are_valid_json_with_what_was_asked(tmp_path):
    run_queue([Job("a", "kind", {"rho": 0.1})], tmp_path, lambda job, needs: {"x": float("nan")}, log=quiet)
    row = json.loads((tmp_path / "rows" / "a.json").read_text(), parse_constant=pytest.fail)
    assert (row["kind"], row["settings"], row["x"]) == ("kind", {"rho": 0.1}, None)


@pytest.mark.parametrize(
    ("jobs", "message"), [([Job("a", "k"), Job("a", "k")], "two jobs"), ([Job("a", "k", needs=("b",))], "no job")]
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, jobs, message):
    with pytest.raises(UserError, match=message):
        run_queue(jobs, tmp_path, lambda job, needs: {}, log=quiet)
