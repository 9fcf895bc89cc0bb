"""`shapo plan` from the command line, and the table in the documents that it made."""

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from shapo.cli import main
from shapo.planning.document import DOCUMENT, rows_of, table_lines

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LlamaConfig(**SMALL).save_pretrained("model")

    def run(*arguments):
        code = main(["plan", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_config_file_suffices_and_the_numbers_go_to_json(plan, tmp_path):
    small = ["--batch-size", 8, "--length", 16, "--json", "plan.json"]
    code, out, error = plan("--model", "model/config.json", *small, "--way", "plain", "--way", "delta")
    assert (code, error) == (0, "")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert list(found["ways"]) == ["plain", "delta"]
    plain, delta = found["ways"]["plain"], found["ways"]["delta"]
    assert plain["price"] == 1
    assert 1.4 < delta["price"] < 1.8
    assert plain["sent"] == delta["sent"] == 0
    assert plain["peak"] == sum(plain["at_the_peak"].values())
    assert re.search(r"^delta +\S", out, re.MULTILINE)


def test_ranks_divide_the_batch_and_what_an_engine_divides(plan, tmp_path):
    def numbers(*more):
        shape = ["--batch-size", 8, "--length", 16, "--way", "delta", "--dtype", "float32"]
        assert plan("--model", "model", *shape, "--json", "plan.json", *more)[0] == 0
        return json.loads((tmp_path / "plan.json").read_text())

    one, four = numbers(), numbers("--engine", "fsdp2", "--ranks", 4)
    assert (one["pairs_at_once"], four["pairs_at_once"]) == (8, 2)
    weights = [found["ways"]["delta"]["largest"]["weights"] for found in (one, four)]
    assert weights[1] == pytest.approx(weights[0] / 4, rel=0.01)
    assert four["ways"]["delta"]["sent"] > 0
    parts = numbers("--micro-batch-size", 2)
    assert (parts["pairs_at_once"], parts["micro_batches"]) == (2, 4)
    assert parts["ways"]["delta"]["flops"] == pytest.approx(one["ways"]["delta"]["flops"], rel=0.01)
    assert parts["ways"]["delta"]["largest"]["activations"] < one["ways"]["delta"]["largest"]["activations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere/here"], "in the hub's local cache"),
        (["--model", "./nowhere"], "there is no such folder or file"),
        (["--model", "."], "has no config.json"),
        (["--model", "model", "--ranks", "8"], "name it with --engine"),
        (["--model", "model", "--engine", "zero3", "--way", "in_place"], "cannot run under zero3"),
        (["--model", "model", "--percent", "0"], "a share in (0, 100]"),
        (["--model", "model", "--depth", "2"], "a share in (0, 1]"),
        (["--model", "model", "--length", "8", "--prompt-length", "8"], "expected prompt < whole"),
        (["--model", "model", "--lora", "rank=3"], "does not know 'rank'"),
        (["--model", "model", "--attn", "nothing"], "the attention nothing cannot be used"),
        (["--model", "model", "--ranks", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(plan, arguments, message):
    code, _, error = plan("--batch-size", 4, "--length", 16, *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_configuration_is_one_line(plan, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", ')
    code, _, error = plan("--model", "config.json")
    assert (code, error.count("\n")) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ways"), [("8B", ("plain", "lora", "reuse")), ("70B", ("plain",))])
def test_the_tables_in_the_documents_are_what_the_command_says(model, ways):
    text = (Path(__file__).parents[3] / DOCUMENT).read_text()
    rows = [line for line in table_lines(model, ways) if line.startswith(("Llama", *(f"| {way} " for way in ways)))]
    assert len(rows) == 1 + len(ways)
    assert set(rows) <= set(rows_of(text, model))
