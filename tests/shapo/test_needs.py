"""Options without an effect are refused, and every option that names a file says so: over all commands."""

from __future__ import annotations

import argparse
import importlib

import pytest

from shapo import cli, options, recipe
from shapo.cli import COMMANDS, main
from shapo.errors import UserError
from shapo.needs import check_needs, unmet
from shapo.options import Group, declared, typed

# Free text that is no file. What is not in this list must be marked as read, written or filled.
PLAIN = {
    "adapter", "attn", "device", "eval_split", "judge", "lm_eval", "lora", "prompts_format", "push_to_hub", "qlora",
    "split", "title", "unsafe_label",
}  # fmt: skip

# What each command must be given, so that only the option in question is wrong.
LINES = {
    "attack": ["--output", "o", "--model", "m", "--data", "d", "--prompts", "p", "--judge", "refusal-substring"],
    "data": ["check", "d"],
    "evaluate": ["--output", "o"],
    "import-gguf": ["f", "--output", "o"],
    "judge": ["--answers", "a", "--judge", "refusal-substring", "--output", "o"],
    "plan": ["--model", "m", "--way", "sam"],
    "probe": ["--output", "o", "--model", "m", "--data", "d", "--published"],
    "report": ["r"],
    "reward": ["--output", "o", "--model", "m", "--data", "d"],
    "safety-pairs": ["--output", "o", "--refusal-direction", "r", "--jailbreakbench", "j"],
    "select": ["--output", "o", "--model", "m", "--method", "full"],
    "sft": ["--output", "o", "--model", "m", "--data", "d"],
    "sharpness": ["--output", "o", "--model", "m", "--data", "d"],
    "study": ["--output", "o", "--report"],
    "train": ["--output", "o", "--model", "m", "--data", "d"],
}


def found(command):
    return [
        (group, name, *declared(group.table)[name]) for group in cli._groups(command) for name in declared(group.table)
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_names_a_file_is_marked(command):
    for _, name, field, told in found(command):
        free = told.parse is str and not told.choices and field.default is not False
        marks = told.reads + told.writes + told.fills
        assert marks == (1 if free and name not in PLAIN else 0), (command, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_filled_has_its_names_listed(command):
    module = importlib.import_module(cli._module(command))
    fills = any(told.fills for *_, told in found(command))
    assert fills == bool(getattr(module, "REPLACES", ())), command


@pytest.mark.parametrize("command", [command for command in COMMANDS if command in LINES])
def test_an_option_without_an_effect_gives_one_line_before_anything_is_read(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = cli.build_parser().parse_args([command, *LINES[command]])
    idle = [(name, field, told) for group, name, field, told in found(command) if unmet(group, name, parsed)]
    for name, field, told in idle:
        value = [] if field.default is False else [(*told.choices, "1")[0]]
        assert main([command, *LINES[command], typed(name), *value]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"shapo: error: {typed(name)} has no effect with"), (command, lines)
    assert not list(tmp_path.iterdir())


def test_options_that_were_once_ignored_are_reported(capsys):
    for line, message in (
        ("evaluate --output o --verdicts v --beta 0.2", "--beta has no effect without --data"),
        ("evaluate --output o --verdicts v --batch-size 2", "--batch-size has no effect without --data"),
        ("evaluate --output o --model m --prompts p --answers a --seed 3", "--seed has no effect without --temp"),
        ("probe --output o --model m --data d --published --lr 0.1", "--lr has no effect with --published"),
        ("sharpness --output o --model m --data d --random 3", "--random has no effect without --subspace"),
        ("study --output o --report --hours 1", "--hours has no effect with --report"),
        ("data check d --max-length 8", "--max-length has no effect without --model"),
        ("judge --answers a --judge refusal-substring --output o --threshold 0.3",
         "--threshold has no effect without --judge classifier or --judge probe or --judge judgezoo:NAME"),
        ("judge --answers a --judge refusal-substring --output o --raw",
         "--raw has no effect with the judge refusal-substring, which writes no text"),
        ("train --output o --model m --data d --subspace full", "--subspace has no effect without --rho"),
        ("train --output o --model m --data d --rho 1 --subspace full --per-micro-batch",
         "--per-micro-batch has no effect without --rho and --micro-batch-size or --rho and --accumulate"),
        ("plan --model m --way plain --way lora --depth 0.5", "--depth has no effect without --way reuse"),
        ("sft --output o --model m --data d --keep 3", "--keep has no effect without --save-every"),
    ):  # fmt: skip
        assert main(line.split()) == 2
        assert message in capsys.readouterr().err, line


def test_a_written_recipe_has_no_option_without_an_effect():
    groups = cli._groups("evaluate")
    parsed = cli.build_parser().parse_args(["evaluate", "--verdicts", "v", "--output", "o"])
    values = recipe.merged(parsed, groups)
    assert values == {"output": "o", "verdicts": ["v"], "quiet": False}
    check_needs(groups, parsed, [], [typed(name) for name in values])


def test_a_recipe_may_repeat_a_default_that_has_no_effect():
    group = Group(importlib.import_module("shapo.commands.evaluate").PairOptions)
    parsed = argparse.Namespace(reference=None, beta=0.1, batch_size=4, data=[], lm_eval=None, prompts=None)
    check_needs([group], parsed, [], ["--beta=0.1"])
    with pytest.raises(Exception, match="--batch-size has no effect"):
        check_needs([group], parsed, [], ["--batch-size=4"])


def test_the_batch_is_that_of_prompts_answered_by_the_default_engine():
    given = ["--model", "m", "--prompts", "p", "--answers", "a", "--batch-size", "4"]
    answering = ["evaluate", *LINES["evaluate"], *given]
    for more, refused in (([], False), (["--engine", "hf"], False), (["--engine", "vllm"], True)):
        line = [*answering, *more]
        parsed = cli.build_parser().parse_args(line)
        if refused:
            with pytest.raises(UserError, match=r"--batch-size has no effect without .* --engine hf"):
                check_needs(cli._groups("evaluate"), parsed, line, line)
        else:
            check_needs(cli._groups("evaluate"), parsed, line, line)


@pytest.mark.parametrize("more", ["--noise 0 --noise-seed 1", "--eval-every 0", "--noise 0 --eval-every 5"])
def test_a_sweep_may_pass_through_zero(more):
    line = ["train", *LINES["train"], *more.split()]
    check_needs(cli._groups("train"), cli.build_parser().parse_args(line), line, line)


def test_data_without_its_verb_says_what_to_type(capsys):
    assert main(["data", "pairs.jsonl"]) == 2
    assert capsys.readouterr().err.endswith("the word check before its name: shapo data check pairs.jsonl\n")


def test_paths_in_other_forms_are_seen(tmp_path):
    parsed = argparse.Namespace(data=["a.jsonl:0.3", "b.jsonl"], subspace=["n=c.safetensors"])
    groups = [group for name in ("train", "sharpness") for group in cli._groups(name)]
    paths = {str(path) for _, path in options.named_files(groups, parsed, "reads")}
    assert {"a.jsonl", "b.jsonl", "c.safetensors"} <= paths
