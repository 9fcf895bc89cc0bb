"""The fuzz suite of the command line, at its smallest size; see `run.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_hundred_generated_command_lines_end_as_they_should():
    done = subprocess.run(
        [sys.executable, str(RUN), "--cases", "300"], capture_output=True, text=True, check=False, timeout=580
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    # Libraries may have printed before.
    assert done.stdout.splitlines()[-1].startswith("0 failures")


def test_every_command_is_among_the_lines():
    from shapo.cli import COMMANDS
    from tests.fuzz.lines import kinds

    assert {kind.split()[0] for kind in kinds()} == set(COMMANDS)


def test_a_case_is_made_of_the_seed_and_its_number_alone(tmp_path):
    from tests.fuzz.lines import make_case

    cases = [json.dumps(vars(make_case(number, 3, tmp_path))) for number in range(40)]
    assert cases == [json.dumps(vars(make_case(number, 3, tmp_path))) for number in range(40)]
    assert len(set(cases)) == 40


def test_only_a_command_that_is_given_a_model_must_fail_where_the_model_is_broken(tmp_path):
    from tests.fuzz.lines import make_case

    cases = [make_case(number, 5, tmp_path) for number in range(3000)]
    broken = [case.arguments for case in cases if case.must_fail == "a model that is not whole"]
    assert broken
    assert all({"--model", "--reward-model"} & set(arguments) for arguments in broken)


@pytest.mark.parametrize(
    ("code", "error", "after", "wrong"),
    [
        (2, "shapo: error: no\n", {"a": "1"}, None),
        (1, "Traceback (most recent call last):\nKeyError: 3\n", {"a": "1"}, "a traceback: KeyError: 3"),
        (-11, "", {"a": "1"}, "died of signal 11"),
        (2, "", {"a": "1"}, "exit code 2 with 0 error lines"),
        (0, "", {"a": "1"}, "a silent success: it was broken"),
        (2, "shapo: error: no\n", {"a": "2"}, "a was overwritten"),
        (2, "shapo: error: no\n", {}, "a was overwritten"),
    ],
)
def test_what_is_wrong_is_seen(code, error, after, wrong):
    from tests.fuzz.lines import Case
    from tests.fuzz.run import judge

    case = Case(0, ["train"], must_fail="it was broken")
    assert judge(case, code, error, {"a": "1"}, after, []) == wrong
