"""Worker processes end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

CODE = """
import sys, time
from shapo.demo.workers import workers
from tests.shapo.demo.test_workers import report_and_wait
if __name__ == "__main__":
    with workers(2) as spread:
        list(spread([(report_and_wait, sys.argv[1])] * 2))
"""


def report_and_wait(folder: str) -> None:
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(120)


def test_workers_of_a_parent_that_is_killed_end_within_two_seconds(tmp_path):
    (tmp_path / "pids").mkdir()
    (tmp_path / "main.py").write_text(CODE)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py"), str(tmp_path / "pids")])
    try:
        until = time.monotonic() + 90
        while len(pids := os.listdir(tmp_path / "pids")) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(pids) == 2
    finally:
        parent.kill()
        parent.wait()
    time.sleep(2)
    alive = [int(pid) for pid in pids if _is_running(int(pid))]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
