"""The command line as a whole: the usual way from end to end, help, and what any command does with bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shapo.cli import COMMANDS, main
from shapo_kernels import Subspace
from tests.support.commands import TOKENS, train_arguments


def test_the_usual_way_from_sft_to_evaluation(shapo, files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, data = "sft/model", ["--data", files / "train.jsonl", *TOKENS, "--quiet"]
    steps = [
        ["sft", "--model", files / "model", "--output", "sft", "--updates", 2, "--held-out", 8, *data],
        ["probe", "--model", model, "--output", "probe", "--epochs", 3, "--cache", *data],
        ["select", "--model", model, "--method", "probe", "--percent", 5, "--probe", "probe/probe.safetensors",
         "--output", "probe.safetensors"],
        ["select", "--model", model, "--method", "gradient", "--percent", 5, "--output", "gradient.safetensors", *data],
        ["select", "--model", model, "--method", "random", "--like", "probe.safetensors",
         "--output", "random.safetensors"],
        ["train", "--model", model, "--output", "train", "--updates", 2, "--batch-size", 8, "--noise", 0.25,
         "--eval-data", files / "test.jsonl", "--rho", 0.3, "--relative-rho", "--subspace", "probe.safetensors",
         "--micro-batch-size", 4, "--per-micro-batch", "--ascent-pairs", 1, "--plain-updates", 1, *data],
        ["sharpness", "--model", "train/model", "--reference", model, "--subspace", "probe.safetensors", "--limit", 6,
         "--rhos", "0.1", "--ratios", "0.1,0.2", "--bf16", "--output", "sharpness", *data],
        ["evaluate", "--model", "train/model", "--reference", model, "--data", files / "test.jsonl", *TOKENS,
         "--prompts", files / "test.jsonl", "--prompts-limit", 2, "--answers", "answers.jsonl", "--max-new-tokens", 4,
         "--output", "evaluation.json", "--quiet"],
    ]  # fmt: skip
    for step in steps:
        code, _, error = shapo(*step)
        assert code == 0, (step, error)
    assert AutoModelForCausalLM.from_pretrained("train/model").config.model_type == "llama"
    assert AutoTokenizer.from_pretrained("train/model").eos_token
    assert Subspace.load("probe.safetensors").count == round(0.05 * 128)
    for name in ("probe/probe.png", "sharpness/sharpness.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["preferences"]["accuracy"]["n"] == 32
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    run = json.loads((tmp_path / "train/run.json").read_text())
    assert run["rho_over_weight_norm"] == pytest.approx(0.3, rel=1e-3)
    assert run["flipped"] == 12
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sft", "--updates", 1, "--eval-every", 1, "--output", "out"], "--eval-every has no effect without --held"),
        (["train", "--eval-every", 1, "--output", "out"], "--eval-every has no effect without --eval-data or --noise"),
        (["train", "--stream", "--output", "out"], "--stream has no effect on"),
        (["train", "--noise-seed", 3, "--output", "out"], "--noise-seed has no effect without --noise"),
        (["train", "--updates", 1, "--epochs", 2, "--output", "out"], "not allowed with argument"),
        (["train", "--resume", "--overwrite", "--output", "out"], "not allowed with argument"),
        (["train", "--output", "out", "--rho", "0.1", "--subspace", "full", "--interval", 9, "--updates", 2],
         "of 2 updates none would be a ShaPO update"),
        (["evaluate", "--temperature", "0.5", "--output", "e.json"], "--temperature has no effect without --prompts"),
    ],
    ids=str,
)  # fmt: skip
def test_an_option_that_can_never_act_is_refused(command, message, shapo, files, tmp_path):
    code, _, error = shapo(*command, "--model", files / "model", "--data", files / "train.jsonl", "--quiet")
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr=--"], "--lr is given no value"),
        (["--output", "\udc80"], "is not UTF-8"),
        (["--eval-data", ""], "--eval-data is empty"),
        (["--output", "x" * 300], "File name too long"),
        (["--model", "x" * 300], "File name too long"),
        (["--lr", "1e308"], "the learning rate is 1e+308"),
        (["--lr", "1e37"], "training has diverged"),
        (["--seed", "-1"], "a whole number from 0"),
        (["--limit", "99999999999999999999"], "a whole number of at least 1"),
        (["--device", "meta"], "cannot be used"),
    ],
    ids=str,
)
def test_what_an_argument_can_cause_is_one_line(arguments, message, shapo, files):
    code, _, error = shapo(*train_arguments(files), *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error


def test_a_mistake_in_the_program_keeps_its_traceback(shapo, files, monkeypatch):
    import shapo.training.engine as module

    def mistaken(*_, **__):
        raise KeyError("mine")

    monkeypatch.setattr(module, "require_finite", mistaken)
    with pytest.raises(KeyError, match="mine"):
        shapo(*train_arguments(files))


def test_what_the_model_has_no_embedding_for_is_one_line(shapo, files, tmp_path, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.support.llamas import llama

    size = {"vocab_size": len(tiny_tokenizer)}
    models = {
        "narrow": llama(vocab_size=50),
        "short": GPT2LMHeadModel(GPT2Config(**size, n_positions=24, n_embd=8, n_layer=1, n_head=2)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    messages = {"narrow": "the model has 50 token embeddings", "short": "the model has 24 positions; lower the length"}
    data = ["--data", files / "test.jsonl", *TOKENS, "--quiet"]
    for name, message in messages.items():
        for command in ("sft", "train", "probe", "sharpness", "evaluate"):
            code, _, error = shapo(command, "--model", name, "--output", "out", *data)
            assert (code, error.count("\n")) == (2, 1), error
            assert message in error
    prompts = ["--prompts", files / "test.jsonl", "--answers", "a.jsonl", "--max-new-tokens", 40]
    code, _, error = shapo("evaluate", "--model", "short", "--output", "out", *prompts, *TOKENS, "--quiet")
    assert (code, error.count("\n")) == (2, 1), error
    assert messages["short"] in error
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(models)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    assert leave.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_help_gives_each_method_a_line_and_defaults_as_they_are_typed(capsys):
    for command in ("select", "sharpness"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    text = capsys.readouterr().out
    for method in ("probe", "gradient", "random", "neurons", "full"):
        assert re.search(rf"^  {method}  ", text, re.MULTILINE), method
    assert "(default: 0.01,0.03,0.1,0.3,1)" in text
    assert "(default: [" not in text


def test_the_documentation_names_every_command():
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    for command in COMMANDS:
        assert f"| `{command}` |" in text


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from shapo.cli import build_parser; build_parser().format_help(); "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "shapo", "train"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("shapo: error: the following arguments are required")
    assert done.stderr.count("\n") == 1
