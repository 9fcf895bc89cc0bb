"""What the commands say to a user of a chat model."""

import copy
import json

import pytest

from shapo.cli import main
from shapo.models import loading
from shapo.models.loading import save_model

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}<assistant>"


@pytest.fixture
def command(tiny_llama, tiny_tokenizer, synthetic_rows, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    save_model(tmp_path / "model", tiny_llama, tokenizer)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows["train"][:8]))
    given = ["--model", tmp_path / "model", "--data", data, "--output", tmp_path / "e.json", "--device", "cpu"]
    return ["evaluate", *map(str, given), "--reference", str(tmp_path / "model"), "--quiet"]


def test_a_chat_template_that_is_not_used_is_pointed_at(command, capsys):
    assert main(command) == 0
    assert "--chat-template" in capsys.readouterr().err


def test_bf16_is_pointed_at_once_where_it_would_help(tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr(loading, "_computes_in_bf16", lambda: True)
    loading._say_bf16.cache_clear()
    loading.hint_at_bf16(tiny_llama)
    assert capsys.readouterr().err == ""  # small enough anyway
    large = copy.deepcopy(tiny_llama)
    large.resize_token_embeddings(2_000_000)
    loading.hint_at_bf16(large)
    loading.hint_at_bf16(large)
    assert capsys.readouterr().err.count("--bf16") == 1
    loading._say_bf16.cache_clear()
    loading.hint_at_bf16(large.bfloat16())
    assert capsys.readouterr().err == ""
