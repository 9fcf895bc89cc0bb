"""lm-eval on a tiny model with a task of our own: what it is given and what it measures."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from shapo.cli import main
from shapo.errors import UserError
from shapo.harnesses.lm_eval import run_tasks

pytestmark = pytest.mark.slow

CASES = [
    {"q": "one and", "choices": [" two", " a diary"], "answer": 0},
    {"q": "ask", "choices": [" her", " Mia"], "answer": 1},
]

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    data = tmp_path / "cases.jsonl"
    data.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny_choice.yaml").write_text(TASK.format(data=data))
    return folder


@torch.no_grad()
def test_a_local_task_measures_the_likelier_choice(task, tiny_llama, tiny_tokenizer):
    found = run_tasks(tiny_llama.eval(), tiny_tokenizer, ["tiny_choice"], folder=task, batch_size=2)
    right = []
    for case in CASES:
        sums = []
        for choice in case["choices"]:
            prompt, whole = (list(tiny_tokenizer(t)["input_ids"]) for t in (case["q"], case["q"] + choice))
            logps = tiny_llama(input_ids=torch.tensor([whole])).logits[0].log_softmax(1)
            sums.append(sum(logps[n - 1, whole[n]].item() for n in range(len(prompt), len(whole))))
        right.append(sums.index(max(sums)) == case["answer"])
    assert found["tiny_choice"]["metrics"] == {"acc,none": sum(right) / len(right)}
    assert found["tiny_choice"]["cases"] == 2


def test_the_command_puts_the_tasks_into_its_result(task, tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    arguments = [
        "--lm-eval",
        "tiny_choice",
        "--lm-eval-path",
        task,
        "--lm-eval-limit",
        1,
        "--output",
        tmp_path / "e.json",
    ]
    assert main(["evaluate", "--model", str(tmp_path / "model"), *map(str, arguments)]) == 0
    found = json.loads((tmp_path / "e.json").read_text())["lm_eval"]["tiny_choice"]
    assert found["cases"] == 1
    assert found["metrics"]["acc,none"] in (0.0, 1.0)


def test_an_unknown_task_gives_one_line(task, tiny_llama, tiny_tokenizer):
    with pytest.raises(UserError, match="lm-eval has no task 'no_such_task'"):
        run_tasks(tiny_llama, tiny_tokenizer, ["no_such_task"], folder=task)


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tiny_llama, tiny_tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install shapo-kernels\[harness\]"):
        run_tasks(tiny_llama, tiny_tokenizer, ["any"])


def test_the_command_says_so_before_it_loads_a_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = ["--model", str(tmp_path / "nowhere"), "--lm-eval", "any", "--output", str(tmp_path / "o.json")]
    assert main(["evaluate", *arguments]) == 2
    assert "pip install shapo-kernels[harness]" in capsys.readouterr().err
