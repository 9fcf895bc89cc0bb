"""Runs killed at random moments: no checkpoint ever holds perturbed weights, and what goes on is what was stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parents[2] / "support" / "killed_runs.py"


@pytest.mark.slow
def test_fifty_kills_and_interrupts_leave_checkpoints_of_the_uninterrupted_run_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), "50"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = json.loads(done.stdout.splitlines()[-1])["kills"]
    assert len(kills) >= 50
    for kill in kills:
        # Of the weights, the optimizer, the schedule and the random states; where a run was resumed, too.
        assert kill["differences"] == [], kill
        assert kill["code"] in (0, 130, -9), (kill, done.stderr[-3000:])
    # The signals came at many moments, and runs were resumed from many.
    assert len({kill["update"] for kill in kills}) >= 6
    assert sum(kill["code"] == -9 for kill in kills) >= 10
    assert sum(kill["code"] == 130 for kill in kills) >= 10
