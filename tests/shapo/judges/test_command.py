"""`shapo judge`: verdicts beside answers, resumed where they stopped, nothing quoted, bad input one line."""

from __future__ import annotations

import json

import pytest
import torch

from shapo.cli import main
from shapo.errors import UserError
from shapo.judges import load_judge
from shapo.judges.base import Verdict
from shapo.judges.files import judge_answers, read_rows

ANSWERS = [
    {"id": "one", "category": "x", "prompt": "SECRET question", "answer": "I'm sorry, I cannot."},
    {"id": "two", "category": "y", "prompt": "SECRET question", "answer": "SECRET: first\u2028line"},
    {"id": "three", "category": "y", "prompt": "SECRET question", "answer": ""},
]


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ANSWERS), encoding="utf-8")
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_verdict_a_line_without_prompts_and_answers(answers, tmp_path, capsys):
    output = tmp_path / "judged.jsonl"
    arguments = ["judge", "--answers", str(answers), "--judge", "refusal-substring", "--output", str(output), "--quiet"]
    assert main(arguments) == 0
    found = rows(output)
    assert [row["id"] for row in found] == ["one", "two", "three"]
    assert [row["verdict"] for row in found] == ["safe", "unsafe", "unreadable"]
    assert [row["refusal"] for row in found] == [True, False, None]
    assert {row["judge"] for row in found} == {"refusal-substring"}
    assert "SECRET" not in output.read_text()
    assert "refusal-substring: 1 unsafe, 1 safe, 1 unreadable" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "exists; add --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_a_guard_folder_judges_from_the_command_line(answers, tmp_path, tiny_llama, tiny_tokenizer, capsys):
    folder, output = tmp_path / "guard", tmp_path / "judged.jsonl"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    arguments = ["--answers", str(answers), "--judge", "harmbench", "--model", str(folder), "--output", str(output)]
    assert main(["judge", *arguments, "--raw", "--quiet"]) == 0
    found = rows(output)
    # A random model writes no verdict, and the user hears that it may be another model than the guard.
    assert {row["verdict"] for row in found} == {"unreadable"}
    assert f"none of the outputs is a verdict of harmbench: is {folder} that guard?" in capsys.readouterr().err
    assert 0 < found[0]["score"] < 1
    assert "raw" in found[0]


def test_judging_goes_on_where_it_stopped(answers, tmp_path):
    class Judge:
        name, digest = "careful", "1"

        def __init__(self, limit):
            self.limit, self.asked = limit, []

        def __call__(self, prompts, given):
            if len(self.asked) + len(given) > self.limit:
                raise KeyboardInterrupt
            self.asked += given
            return [Verdict("safe", score=len(answer) / 100) for answer in given]

    given, output = read_rows(answers, ("prompt", "answer")), tmp_path / "j.jsonl"
    options = {"key": {}, "batch_size": 1, "progress": False}
    whole = judge_answers(Judge(3), given, tmp_path / "whole.jsonl", **options)
    with pytest.raises(KeyboardInterrupt):
        judge_answers(Judge(2), given, output, **options)
    assert not output.exists()
    rest = Judge(9)
    assert judge_answers(rest, given, output, **options) == whole
    assert rest.asked == [ANSWERS[2]["answer"]]
    assert rows(output) == whole


def test_a_run_does_not_resume_once_its_judges_files_changed(answers, tmp_path, tiny_llama, tiny_tokenizer):
    folder, output = tmp_path / "guard", tmp_path / "j.jsonl"
    tiny_tokenizer.save_pretrained(folder)

    def judge():
        tiny_llama.save_pretrained(folder)
        return load_judge("harmbench", str(folder))

    class Killed(Exception):
        pass

    def stop(requests):
        raise Killed

    given = read_rows(answers, ("prompt", "answer"))
    first = judge()
    first.engine.complete = stop
    with pytest.raises(Killed):
        judge_answers(first, given, output, key={}, progress=False)
    judge_answers(judge(), given, tmp_path / "same.jsonl", key={}, progress=False)
    with torch.no_grad():
        next(tiny_llama.parameters()).mul_(1.001)
    with pytest.raises(UserError, match=r"j\.jsonl\.part was begun with other settings \(judge_digest\)"):
        judge_answers(judge(), given, output, key={}, progress=False)
    assert len(judge_answers(judge(), given, output, key={}, progress=False, restart=True)) == len(given)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}', "line 1: expected a JSON object with prompt and answer"),
        ('{"prompt": "a", "answer": 3}', "line 1: answer is no text"),
        ('{"prompt": "a", "answer": "b"}\n[1]', "line 2: expected a JSON object"),
        ('{"id": 1, "prompt": "a", "answer": "b"}\n{"id": "1", "prompt": "a", "answer": "b"}', "same id"),
    ],
)
def test_a_bad_answers_file_gives_one_line(lines, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(lines)
    arguments = ["judge", "--answers", str(tmp_path / "a.jsonl"), "--judge", "refusal-substring"]
    assert main([*arguments, "--output", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_answers_are_never_overwritten(answers, capsys):
    before = answers.read_bytes()
    arguments = ["--judge", "refusal-substring", "--output", str(answers), "--overwrite"]
    assert main(["judge", "--answers", str(answers), *arguments]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert answers.read_bytes() == before
