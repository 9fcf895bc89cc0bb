"""Jobs of which each leaves one row, done by any number of processes that may be killed and started again.

A job is done when its row is there, and a row is written in one step. Who works on a job holds an exclusive lock on a
file of the job's name; the system releases it when the process ends, in whatever way. So there is nothing to clear up
after a kill: what was under way is simply done again.
"""

from __future__ import annotations

import fcntl
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from shapo.errors import UserError
from shapo.storage.files import write_json

__all__ = ["Job", "Row", "read_rows", "rounded", "run_queue"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: Of the row's file; letters, digits, dots and dashes.
        kind: Which function does it.
        settings: What the function is told; JSON values.
        needs: Names of the jobs whose rows must be there first.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def run_queue(
    jobs: Sequence[Job],
    folder: Path,
    work: Callable[[Job, Mapping[str, Row]], Row],
    *,
    until: float | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """Does what is left of `jobs`, in their order as far as their needs allow; returns how many it did.

    A job that raises leaves a row with `error`, which the next call of `run_queue` tries again; what needs it waits
    until then. Jobs that other processes hold are passed over.

    Args:
        jobs: In the order of what matters most.
        folder: Where rows and locks are kept.
        work: Does a job, given the rows of its needs, and returns its row.
        until: Time (`time.time()`) after which no further job is begun.
        log: Is told what happens.

    Raises:
        UserError: Two jobs of one name, or a need that no job meets.
    """
    _check(jobs)
    done, tried = 0, set[str]()
    while until is None or time.time() < until:
        rows = read_rows(folder)
        ready = [job for job in jobs if _open(job, rows) and job.name not in tried and _met(job, rows)]
        for job in ready:
            with _held(folder, job) as mine:
                if not mine or not _open(job, read_rows(folder)):
                    continue
                tried.add(job.name)
                done += _do(job, folder, work, rows, log)
                break
        else:
            return done
    return done


def read_rows(folder: Path) -> dict[str, Row]:
    """The rows of all jobs done so far, by name, failed ones included."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "rows").glob("*.json"))
    }


def rounded(values: Tensor) -> list[float]:
    """The items of a row, with as many digits as are worth a line."""
    return [round(float(value), 6) for value in values]


def _do(
    job: Job,
    folder: Path,
    work: Callable[[Job, Mapping[str, Row]], Row],
    rows: Mapping[str, Row],
    log: Callable[[str], None],
) -> bool:
    start, processor = time.perf_counter(), time.process_time()
    result: Row
    try:
        result = work(job, {name: rows[name] for name in job.needs})
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
    write_json(
        folder / "rows" / f"{job.name}.json", {"kind": job.kind, "settings": dict(job.settings), **result, **seconds}
    )
    log(f"{job.name}: {result.get('error') or 'done'} ({seconds['seconds']:.0f} s)")
    return "error" not in result


@contextmanager
def _held(folder: Path, job: Job) -> Iterator[bool]:
    """Whether this process alone holds the job inside."""
    path = folder / "locks" / job.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _open(job: Job, rows: Mapping[str, Row]) -> bool:
    return job.name not in rows or "error" in rows[job.name]


def _met(job: Job, rows: Mapping[str, Row]) -> bool:
    return all(name in rows and "error" not in rows[name] for name in job.needs)


def _check(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs]
    for job in jobs:
        if names.count(job.name) > 1:
            raise UserError(f"two jobs are called {job.name!r}, but each needs a name of its own")
        for need in job.needs:
            if need not in names:
                raise UserError(f"the job {job.name!r} needs {need!r}, which is no job of this plan")
