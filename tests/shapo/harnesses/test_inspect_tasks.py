"""inspect_ai on a tiny folder with a local task: greedy answers, one of our judges as the scorer."""

from __future__ import annotations

import json
import sys

import pytest

pytestmark = pytest.mark.slow


def test_a_local_task_serves_the_folder_and_scores_by_a_judge(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")
    from shapo.harnesses.inspect_tasks import prompts

    tiny_llama.generation_config.repetition_penalty = 3.0
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    earlier = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: question 2\n\nAssistant:"
    rows = [{"id": str(n), "prompt": f"question {n}" if n < 2 else earlier} for n in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # inspect works in the task file's folder; paths are those of where it was started.
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "judge_beside_the_prompts.py").write_text("from tests.support.judges import by_word\n")
    task = prompts("model", "p.jsonl", judge="judge_beside_the_prompts:by_word", max_tokens=4)
    (log,) = inspect_ai.eval(task, log_dir=str(tmp_path / "logs"), display="none", log_format="json")
    assert log.status == "success", log.error
    asked = [[(message.role, message.content) for message in sample.input] for sample in log.samples]
    assert asked[:2] == [[("user", "question 0")], [("user", "question 1")]]
    assert asked[2] == [("user", "hello"), ("assistant", "hi"), ("user", "question 2")]
    assert all(sample.scores["by_judge"].value == {"unsafe": 0.0, "unreadable": 0.0} for sample in log.samples)
    assert log.eval.model == "hf/local"


def test_the_published_tasks_need_their_package(monkeypatch, tmp_path):
    pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")
    from shapo.errors import UserError
    from shapo.harnesses import inspect_tasks

    for name in ("strong_reject", "xstest", "coconot"):
        monkeypatch.setitem(sys.modules, f"inspect_evals.{name}", None)
        with pytest.raises(UserError, match="pip install inspect-evals"):
            inspect_tasks._published(name, str(tmp_path), 8)
