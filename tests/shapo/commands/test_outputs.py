"""What the commands write: never over an input, never two at once."""

from __future__ import annotations

import json
import os

from shapo_kernels import Subspace
from tests.support.commands import TOKENS, train_arguments


def test_no_output_is_an_input(shapo, files, tmp_path):
    import shutil

    shutil.copytree(files, tmp_path / "in")
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()}
    model, data, subspace = (f"in/{name}" for name in ("model", "train.jsonl", "subspace.safetensors"))
    for command in (
        ["train", "--model", model, "--data", data, "--output", "in", *TOKENS],
        ["sft", "--model", model, "--data", data, "--output", "in", *TOKENS],
        ["select", "--method", "random", "--model", model, "--like", subspace, "--output", subspace],
        ["select", "--method", "gradient", "--model", model, "--data", data, "--output", "./in/../in/train.jsonl"],
        ["evaluate", "--model", model, "--data", data, "--output", data],
        ["evaluate", "--model", model, "--prompts", data, "--answers", data, "--output", "e.json"],
        ["evaluate", "--verdicts", data, "--output", data],
        ["train", "--model", model, "--data", data, "--output", model, *TOKENS],
        ["probe", "--model", model, "--data", data, "--output", model, *TOKENS],
        ["study", "--model", model, "--pairs", "in", "--output", "in"],
        ["evaluate", "--model", model, "--data", data, "--output", f"{model}/config.json"],
        ["judge", "--answers", data, "--judge", "refusal-substring", "--output", data, "--overwrite"],
    ):
        code, _, error = shapo(*command)
        assert (code, error.count("\n")) == (2, 1), command
        assert "would overwrite" in error or ", the folder that --" in error, command
    assert {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_two_at_once_may_not_write_the_same(shapo, files, tmp_path):
    from shapo.storage.outputs import locked, sole_writer

    judge = ["judge", "--answers", files / "train.jsonl", "--judge", "refusal-substring", "--output", "v.jsonl"]
    with sole_writer(tmp_path / "v.jsonl"):
        code, _, error = shapo(*judge)
    assert (code, "another run is writing to v.jsonl" in error) == (2, True)
    with locked(tmp_path / "out"):
        code, _, error = shapo("study", "--report", "--output", "out")
    assert (code, "another run is writing to out" in error) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_would_be_changed_is_no_place_for_the_output(shapo, files, tmp_path):
    answers = tmp_path / "a.jsonl"
    answers.write_text(json.dumps({"id": "1", "prompt": "p", "answer": "a"}) + "\n")
    judge = ["judge", "--answers", answers, "--judge", "refusal-substring", "--output", "v.jsonl"]
    assert shapo(*judge)[0] == 0
    before = (tmp_path / "v.jsonl.recipe.yaml").read_text()
    (tmp_path / "v.jsonl").unlink()
    assert shapo("judge", "--config", "v.jsonl.recipe.yaml")[0] == 0
    assert (tmp_path / "v.jsonl.recipe.yaml").read_text() == before
    (tmp_path / "v.jsonl").unlink()
    code, _, error = shapo("judge", "--config", "v.jsonl.recipe.yaml", "--quiet")
    assert (code, "--output would change the recipe v.jsonl.recipe.yaml" in error) == (2, True)
    assert (tmp_path / "v.jsonl.recipe.yaml").read_text() == before


def test_what_another_command_wrote_is_no_place_for_the_output(shapo, files, tmp_path):
    assert shapo(*train_arguments(files))[0] == 0
    assert shapo("select", "--model", files / "model", "--method", "random", "--output", "s")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pairs = ["--model", files / "model", "--data", files / "test.jsonl", "--limit", 2, *TOKENS, "--quiet"]
    reward = ["reward", "--model", files / "model", "--data", files / "train.jsonl", "--quiet", "--output", "out"]
    clones = ["--refusal-direction", files, "--jailbreakbench", files]
    for command, wrote in (
        (["sharpness", *pairs, "--output", "out"], "train"),
        (["probe", *pairs, "--output", "out"], "train"),
        (reward, "train"),
        (["sft", *pairs, "--output", "out"], "train"),
        (["demo", "--size", "small", "--output", "out"], "train"),
        (["study", "--report", "--output", "out"], "train"),
        (["safety-pairs", *clones, "--output", "out"], "train"),
        (["evaluate", *pairs, "--output", "s"], "select"),
    ):
        code, _, error = shapo(*command)
        assert (code, error.count("\n")) == (2, 1), (command, error)
        assert f"of a finished `shapo {wrote}`; choose another output" in error, command
        assert ("--overwrite" in error) == (command[0] == "sft")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert shapo("train", "--config", "out/recipe.yaml", "--overwrite")[0] == 0


def test_a_training_run_that_is_not_finished_is_no_place_for_another_commands_output(shapo, files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    pairs = ["--model", files / "model", "--data", files / "test.jsonl", "--limit", 2, *TOKENS, "--quiet"]
    code, _, error = shapo("sharpness", *pairs, "--output", "out")
    assert (code, "out, but a training run lies there (metrics.jsonl); choose another output" in error) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


def test_overwrite_takes_the_folder_of_another_command_and_the_same_command_may_run_again(shapo, files, tmp_path):
    pairs = ["--model", files / "model", "--data", files / "test.jsonl", "--limit", 2, *TOKENS, "--quiet"]
    sharpness = ["sharpness", *pairs, "--rhos", "0.1", "--ratios", "0.1", "--output", "out"]
    assert [shapo(*sharpness)[0] for _ in range(2)] == [0, 0]
    code, _, error = shapo(*train_arguments(files))
    assert (code, "or add --overwrite" in error) == (2, True)
    assert not (tmp_path / "out" / "model").exists()
    assert shapo(*train_arguments(files, "--overwrite"))[0] == 0
    assert (tmp_path / "out" / "recipe.yaml").read_text().startswith("# shapo train ")


def test_a_subspace_is_written_into_a_folder_that_is_not_there_yet_and_never_over_a_pipe(shapo, files, tmp_path):
    arguments = ["select", "--model", files / "model", "--method", "random", "--output"]
    assert shapo(*arguments, "new/folder/s.safetensors")[0] == 0
    assert Subspace.load(tmp_path / "new" / "folder" / "s.safetensors").count == 1
    os.mkfifo(tmp_path / "pipe")
    code, _, error = shapo(*arguments, "pipe")
    assert (code, error.count("\n")) == (2, 1)
    assert "it is a device or a pipe" in error
    assert (tmp_path / "pipe").is_fifo()
