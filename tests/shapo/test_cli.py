"""The command line from end to end on small files, and every kind of bad input: one line, exit code 2, nothing left
behind.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shapo.cli import COMMANDS, main
from shapo.training.metrics import read_metrics
from shapo_kernels import Subspace

TOKENS = ["--max-length", "96", "--max-prompt-length", "64"]
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tiny_llama, tiny_tokenizer, synthetic_rows):
    """A saved model, data files in several states, and a subspace."""
    folder = tmp_path_factory.mktemp("files")
    _tiny_llama.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    _tiny_llama.save_pretrained(folder / "bare")
    for split, rows in synthetic_rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    (folder / "columns.jsonl").write_text('{"text": "a"}\n')
    whole = gzip.compress((folder / "train.jsonl").read_bytes())
    (folder / "truncated.jsonl.gz").write_bytes(whole[: len(whole) // 8])
    Subspace({DOWN: [1, 2, 30]}).save(folder / "subspace.safetensors")
    return folder


@pytest.fixture
def shapo(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; gives the exit code, stdout, and stderr without the hint at the template."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        told = [line for line in captured.err.splitlines(keepends=True) if "has a chat template" not in line]
        return code, captured.out, "".join(told)

    return run


def train_arguments(files: Path, *more: object) -> list[object]:
    base = ["train", "--model", files / "model", "--data", files / "train.jsonl", "--limit", 12, "--output", "out"]
    return [*base, *TOKENS, "--updates", 2, "--batch-size", 4, "--lr", "1e-3", "--warmup", 1, "--quiet", *more]


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


def test_a_run_is_resumed_and_never_replaced_unasked(shapo, files, tmp_path):
    assert shapo(*train_arguments(files, "--save-every", 1))[0] == 0
    code, _, error = shapo(*train_arguments(files))
    assert code == 2
    assert "already holds a run; --resume goes on with it, --overwrite replaces it" in error
    assert shapo(*train_arguments(files, "--resume"))[0] == 0
    assert shapo(*train_arguments(files, "--overwrite"))[0] == 0
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    assert "already holds a run; --overwrite replaces it" in shapo(*train_arguments(files))[2]
    code, _, error = shapo(*train_arguments(files, "--resume"))
    assert (code, "out is finished and left no checkpoint; --overwrite replaces it" in error) == (2, True)
    assert len(read_metrics("out/metrics.jsonl", "update")) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "{files}/empty.jsonl"], "empty"),
        (["--data", "{files}/columns.jsonl"], "found the columns text"),
        (["--data", "{files}/truncated.jsonl.gz"], "truncated.jsonl.gz"),
        (["--model", "{files}/nowhere"], "nowhere': there is no such folder"),
        (["--model", "{files}"], "no config.json; did you mean {files}/model?"),
        (["--model", "{files}/empty.jsonl"], "it is a file"),
        (["--model", "{files}/bare"], "has no tokenizer"),
        (["--rho", "0", "--subspace", "full"], "rho is 0.0"),
        (["--rho", "-1", "--subspace", "full"], "rho is -1.0"),
        (["--rho", "nan", "--subspace", "full"], "rho is nan"),
        (["--rho", "x", "--subspace", "full"], "a number, or low,high, is expected"),
        (["--rho", "0.1,0.2", "--subspace", "full"], "needs the norm none"),
        (["--rho", "0.1"], "--rho needs --subspace"),
        (["--interval", "2"], "--interval has no effect without --rho"),
        (["--relative-rho"], "--relative-rho has no effect without --rho"),
        (["--rho", "0.1", "--subspace", "full", "--interval", "0"], "interval is 0"),
        (["--rho", "0.1", "--subspace", "full", "--ascent-pairs", "0"], "ascent_pairs is 0"),
        (["--rho", "0.1", "--subspace", "full", "--ascent-pairs", "1", "--ascent-fraction", "0.5"], "not allowed with"),
        (["--rho", "0.1", "--subspace", "full", "--rho-warmup", "-1"], "rho_warmup is -1"),
        (["--per-micro-batch"], "--per-micro-batch has no effect without --rho"),
        (["--rho", "0.1", "--subspace", "nowhere.safetensors"], "cannot read a subspace"),
        (["--rho", "0.1", "--subspace", "{files}/model/model.safetensors"], "no subspace"),
        (["--noise", "1.5"], "noise rate is 1.5"),
        (["--loss", "nope"], "invalid choice"),
        (["--loss", "reward_level"], "--reward-model"),
        (["--reward-model", "x"], "options of --loss reward_level"),
        (["--epsilon", "0.2"], "epsilon is an option of"),
        (["--loss", "cdpo", "--epsilon", "0.7"], "epsilon is 0.7"),
        (["--batch-size", "0"], "batch size is 0"),
        (["--lr", "nan"], "learning rate is nan"),
        (["--limit", "0"], "whole number of at least 1"),
        (["--resume"], "there is no checkpoint"),
        (["--output", "{files}/empty.jsonl"], "it is a file"),
        (["--output", "{files}/empty.jsonl/below"], "cannot write"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--nonsense"], "unrecognized arguments"),
        (["--updat", "3"], "unrecognized arguments: --updat"),
        (["--seed", "99999999999999999999"], "argument --seed: '99999999999999999999', but a whole number from 0"),
        (["--max-length", "8"], "max_prompt_length"),
        (["--eval-limit", "8"], "--eval-limit has no effect without --eval-data"),
    ],
)
def test_bad_input_of_train_is_one_line_and_leaves_nothing(more, message, shapo, files, tmp_path):
    code, _, error = shapo(*train_arguments(files), *(part.replace("{files}", str(files)) for part in more))
    assert code == 2
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("shapo: error: ")
    assert message.replace("{files}", str(files)) in lines[0]
    assert not list(tmp_path.iterdir())


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


def test_a_warm_up_that_does_not_end_is_told(shapo, files):
    code, _, error = shapo(*train_arguments(files, "--warmup", 5, "--save-every", 3))
    assert code == 0
    assert "shapo: note: warmup is 5, but the run has 2 updates: lr is never reached" in error
    assert "save_every is 3, but the run has 2 updates: no checkpoint is written" in error


@pytest.mark.parametrize(("subspace", "told"), [("full", True), ("head", False)])
def test_a_prefix_that_saves_nothing_is_told(subspace, told, shapo, files):
    code, _, error = shapo(*train_arguments(files, "--rho", 0.1, "--subspace", subspace, "--reuse-prefix"))
    assert code == 0
    assert ("shapo: note: --reuse-prefix saves nothing" in error) == told


def test_a_perturbation_that_is_next_to_nothing_is_told(shapo, files):
    for rho, told in ((1e-9, True), (10.0, False)):
        more = ["--rho", rho, "--subspace", "full", "--norm", "none", "--interval", 1, "--overwrite"]
        code, out, error = shapo(*train_arguments(files, *more))
        assert code == 0
        ratio = float(re.search(r"\|\|W_S\|\|: (\S+)", out)[1])
        assert (ratio < 1e-5, "next to nothing here; see recipe shapo-probe" in error) == (told, told)


def test_what_is_selected_is_counted_in_neurons_and_layers(shapo, files):
    random = ["select", "--model", files / "model", "--method", "random", "--output", "s.safetensors"]
    assert "128 neurons in 2 layers: s.safetensors" in shapo(*random, "--percent", 100)[1]
    assert "1 neuron in 1 layer: s.safetensors" in shapo(*random, "--percent", 0.8)[1]


def test_a_probe_no_better_than_the_majority_class_is_told(shapo, files):
    probe = ["probe", "--model", files / "model", "--data", files / "train.jsonl", *TOKENS, "--quiet", "--output"]
    for name, lr in (("untrained", 1e-12), ("trained", 0.05)):
        code, out, error = shapo(*probe, name, "--lr", lr)
        assert code == 0, error
        accuracy, majority = re.search(r"accuracy (\S+) %, majority class (\S+) %", out).groups()
        assert ("its direction points nowhere" in error) == (float(accuracy) <= float(majority))
        if name == "untrained":
            assert accuracy <= majority


def test_a_short_length_alone_is_no_mistake(shapo, files):
    arguments = [part for part in train_arguments(files) if part not in TOKENS]
    assert shapo(*arguments, "--max-length", 48)[0] == 0
    code, _, error = shapo(*arguments, "--overwrite", "--max-length", 48, "--max-prompt-length", 48)
    assert code == 2
    assert "expected 0 < prompt < whole" in error


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


def test_a_subspace_without_a_neuron_is_one_line(shapo, files, tmp_path):
    Subspace({}).save(tmp_path / "none.safetensors")
    perturbed = ["--rho", 0.1, "--subspace", tmp_path / "none.safetensors"]
    pairs = ["--model", files / "model", "--data", files / "test.jsonl", "--limit", 2, *TOKENS, "--quiet"]
    for command in (train_arguments(files, *perturbed), ["sharpness", *pairs, *perturbed[2:], "--output", "out"]):
        code, _, error = shapo(*command)
        assert (code, error.count("\n")) == (2, 1)
        assert "selects no neuron" in error


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


def test_sizes_and_radii_beyond_the_machine_are_one_line(shapo, files):
    pairs = ["--model", files / "model", "--data", files / "test.jsonl", "--limit", 2, *TOKENS, "--quiet"]
    for command, message in (
        (["bench", "--layers", "100000000"], "lower --layers"),
        (["sharpness", *pairs, "--rhos", "1e308", "--output", "out"], "(1e-30 to 1e30)"),
        (["sharpness", *pairs, "--rhos", "1e-320", "--output", "out"], "(1e-30 to 1e30)"),
        (["sharpness", *pairs, "--rhos", "1e30", "--output", "out"], "not finite; give smaller radii"),
        (["sharpness", *pairs, "--subspace", "head", "--random", "2000", "--output", "out"], "--random from 0 to 1000"),
        (["evaluate", *pairs[:2], "--prompts", files / "test.jsonl", "--answers", "a", "--temperature", "1e-40",
          "--output", "e.json"], "a number from 0.001 on"),
    ):  # fmt: skip
        code, _, error = shapo(*command)
        assert (code, error.count("\n")) == (2, 1), (command, error)
        assert message in error, command


def test_a_mistake_in_the_program_keeps_its_traceback(shapo, files, monkeypatch):
    import shapo.training.engine as module

    def mistaken(*_, **__):
        raise KeyError("mine")

    monkeypatch.setattr(module, "require_finite", mistaken)
    with pytest.raises(KeyError, match="mine"):
        shapo(*train_arguments(files))


def test_an_adapter_folder_trains_and_measures_as_the_whole_model_that_it_makes(shapo, files, tmp_path):
    peft = pytest.importorskip("peft")
    from shapo.models.loading import load_model

    adapted = peft.get_peft_model(
        load_model(str(files / "model")), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    adapted.save_pretrained("adapter")
    arguments = train_arguments(files)
    arguments[2] = "adapter"
    code, _, error = shapo(*arguments)
    assert code == 0, error
    assert "merged into its base model" in error
    assert load_model(str(tmp_path / "out" / "model")).config.model_type == "llama"
    pairs = ["--data", files / "test.jsonl", "--limit", 2, *TOKENS, "--quiet", "--rhos", "0.1", "--ratios", "0.1"]
    assert shapo("sharpness", "--model", "adapter", *pairs, "--output", "sharp")[0] == 0


def test_a_padding_token_without_an_embedding_is_one_line(shapo, files, tmp_path, tiny_tokenizer):
    import copy
    import shutil

    shutil.copytree(files / "model", tmp_path / "model")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<a pad token of its own>"})
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = train_arguments(files)
    arguments[2] = tmp_path / "model"
    code, _, error = shapo(*arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert "the tokenizer pads with id 400, but the model has 400 token embeddings" in error


@pytest.mark.parametrize(
    ("indices", "axis", "message"),
    [
        ({"model.layers.9.mlp.down_proj.weight": [0]}, 1, "no parameter 'model.layers.9.mlp.down_proj.weight'"),
        ({DOWN: [64]}, 1, "64 neurons on axis 1"),
        ({DOWN: [40]}, 0, "32 neurons on axis 0"),
    ],
)
def test_a_subspace_that_does_not_fit_the_model_is_refused(indices, axis, message, shapo, files, tmp_path):
    Subspace(indices, axis).save(tmp_path / "bad.safetensors")
    code, _, error = shapo(*train_arguments(files, "--rho", 0.1, "--subspace", "bad.safetensors"))
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]
    code, _, error = shapo(
        "sharpness", "--model", files / "model", "--data", files / "train.jsonl", "--limit", 2, *TOKENS,
        "--subspace", "bad.safetensors", "--output", "out", "--quiet",
    )  # fmt: skip
    assert (code, error.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_control_that_is_the_given_subspace_is_told(shapo, files, tmp_path):
    model = ("--model", files / "model")
    shapo("select", "--method", "random", "--percent", 25, *model, "--output", "drawn.safetensors")
    measure = ("sharpness", *model, "--data", files / "train.jsonl", "--limit", 2, *TOKENS, "--quiet")
    measure = (*measure, "--subspace", "drawn.safetensors", "--rhos", "0.1", "--ratios", "0.1")
    code, _, error = shapo(*measure, "--output", "same")
    assert code == 0
    assert "the control 'random' has the given subspace's neurons; choose another --random-seed" in error
    code, _, error = shapo(*measure, "--random-seed", 1, "--output", "other")
    assert (code, "given subspace's neurons" in error) == (0, False)


def test_the_output_projection_is_a_subspace_to_measure(shapo, files, tmp_path):
    code, _, error = shapo(
        "sharpness", "--model", files / "model", "--data", files / "train.jsonl", "--limit", 2, *TOKENS,
        "--subspace", "head", "--rhos", "0.1", "--ratios", "0.1", "--output", "out", "--quiet",
    )  # fmt: skip
    assert code == 0
    curves = {curve["name"]: curve for curve in json.loads((tmp_path / "out" / "sharpness.json").read_text())["curves"]}
    assert curves.keys() == {"all parameters", "head"}
    assert 0 < curves["head"]["by_rho"][0]["increase"] < curves["all parameters"]["by_rho"][0]["increase"]
    assert "no random controls: no --subspace is made of neurons" in error


def test_a_subspace_with_a_neuron_twice_is_refused(shapo, files, tmp_path):
    from safetensors.torch import load_file, save_file

    with open(files / "subspace.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    tensors = load_file(files / "subspace.safetensors")
    save_file({name: torch.tensor([1, 1, 2]) for name in tensors}, tmp_path / "twice.safetensors", metadata=header)
    code, _, error = shapo(*train_arguments(files, "--rho", 0.1, "--subspace", "twice.safetensors"))
    assert (code, error.count("\n")) == (2, 1)
    assert "1 twice" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "random", "--percent", "0"], "percent is 0.0"),
        (["--method", "random", "--percent", "100.5"], "percent is 100.5"),
        (["--method", "random", "--percent", "nan"], "percent is nan"),
        (["--method", "probe"], "--method probe needs --probe"),
        (["--method", "gradient"], "--method gradient needs --data"),
        (["--method", "random", "--probe", "x"], "--probe is an option of --method probe"),
        (["--method", "neurons", "--percent", "5"], "--percent is an option of --method probe or gradient or random"),
        (["--method", "probe", "--probe", "x", "--seed", "0"], "--seed is an option of --method random"),
        (["--method", "random", "--depth", "1.5"], "depth is 1.5"),
        (["--method", "full", "--depth", "0.5"], "--depth is an option of --method probe or gradient or random or"),
        (["--method", "random", "--like", "{files}/subspace.safetensors", "--depth", "0.5"], "and --depth out"),
        (["--method", "random", "--batch-size", "4"], "--batch-size is an option of --method gradient"),
        (["--method", "random", "--like", "{files}/subspace.safetensors", "--percent", "5"], "leave --percent"),
        (["--method", "probe", "--probe", "{files}/subspace.safetensors"], "no probe"),
    ],
)
def test_bad_input_of_select_is_one_line(arguments, message, shapo, files, tmp_path):
    arguments = [part.replace("{files}", str(files)) for part in arguments]
    code, _, error = shapo("select", "--model", files / "model", "--output", "s.safetensors", *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_run_above_a_depth_reuses_the_blocks_below(shapo, files, tmp_path):
    upper = ["select", "--model", files / "model", "--method", "random", "--depth", "0.5", "--output", "s.safetensors"]
    assert shapo(*upper)[0] == 0
    assert Subspace.load(tmp_path / "s.safetensors").names == ("model.layers.1.mlp.down_proj.weight",)
    for output, reuse in (("once", ["--reuse-prefix"]), ("twice", [])):
        options = ["--rho", "0.1", "--subspace", tmp_path / "s.safetensors", *reuse]
        code, _, error = shapo(*train_arguments(files, *options, "--output", output))
        assert code == 0, error
    (once,), (twice,) = (sorted((tmp_path / name).rglob("model.safetensors")) for name in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()


def test_a_subspace_is_written_into_a_folder_that_is_not_there_yet_and_never_over_a_pipe(shapo, files, tmp_path):
    arguments = ["select", "--model", files / "model", "--method", "random", "--output"]
    assert shapo(*arguments, "new/folder/s.safetensors")[0] == 0
    assert Subspace.load(tmp_path / "new" / "folder" / "s.safetensors").count == 1
    os.mkfifo(tmp_path / "pipe")
    code, _, error = shapo(*arguments, "pipe")
    assert (code, error.count("\n")) == (2, 1)
    assert "it is a device or a pipe" in error
    assert (tmp_path / "pipe").is_fifo()


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


def test_an_unknown_model_type_is_refused_naming_the_known_ones(shapo, files, tmp_path, tiny_tokenizer):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=len(tiny_tokenizer), hidden_size=8, n_layer=1, n_head=2)).save_pretrained(
        "b"
    )
    code, _, error = shapo("select", "--method", "random", "--model", "b", "--output", "s.safetensors")
    assert (code, error.count("\n")) == (2, 1)
    assert "model type 'bloom' is not supported" in error
    assert "llama" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--data", "x.jsonl"], "need a model"),
        (["--model", "m", "--prompts", "x.jsonl"], "--prompts has no effect without --answers"),
        (["--model", "m", "--prompts", "x.jsonl", "--answers", "./e.json"], "name the same file"),
        (
            ["--model", "m", "--verdicts", "{files}/verdicts.jsonl"],
            "--model has no effect without --data or --prompts or --lm-eval",
        ),
        (["--reference", "m", "--verdicts", "{files}/verdicts.jsonl"], "--reference has no effect without --data"),
        (["--verdicts", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--verdicts", "{files}/columns.jsonl"], "line 1: expected a JSON object with verdict"),
        (["--verdicts", "{files}/empty.jsonl"], "is empty"),
        (["--verdicts", "{files}/verdicts.jsonl", "--output", "."], "cannot be replaced whole; give it a name"),
    ],
)
def test_bad_input_of_evaluate_is_one_line(arguments, message, shapo, files, tmp_path):
    arguments = [part.replace("{files}", str(files)) for part in arguments]
    code, _, error = shapo("evaluate", "--output", "e.json", *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_judges_verdicts_are_counted_without_a_model(shapo, tmp_path):
    (tmp_path / "v.jsonl").write_text('{"verdict": "unsafe"}\n{"verdict": "safe"}\n{"verdict": ""}\n')
    (tmp_path / "c.jsonl").write_text('{"first": "a", "second": "a"}\n')
    code, out, _ = shapo("evaluate", "--verdicts", "v.jsonl", "--comparisons", "c.jsonl", "--output", "e.json")
    assert code == 0
    assert "attack success, v, by unnamed: 33.3 to 66.7 % (1 of 3 unreadable" in out
    assert "over-refusal: not measured" in out
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["attack_success"]["v"]["unreadable"] == 1
    assert result["win_rate"]["value"] == 1.0


@pytest.mark.parametrize("radius", ["0", "-0.1", "nan", "0.1,", "x"])
def test_radii_of_sharpness_must_be_above_zero(radius, shapo, files, tmp_path):
    code, _, error = shapo(
        "sharpness", "--model", files / "model", "--data", files / "train.jsonl", "--output", "out", f"--rhos={radius}"
    )
    assert (code, error.count("\n")) == (2, 1)
    assert "numbers above 0" in error


def test_a_subspace_named_as_a_random_control_is_not_replaced_by_it(shapo, files, tmp_path):
    arguments = ["sharpness", "--model", files / "model", "--data", files / "test.jsonl", "--limit", 2, *TOKENS]
    named = ["--subspace", f"random={files / 'subspace.safetensors'}", "--output", "out", "--quiet"]
    code, _, error = shapo(*arguments, *named)
    assert (code, error.count("\n")) == (2, 1)
    assert "a random control is called 'random' too" in error
    assert not list(tmp_path.iterdir())
    code, out, error = shapo(*arguments, *named, "--random", 0, "--rhos", "0.1", "--ratios", "0.1")
    assert (code, error) == (0, ""), "one radius makes no axis of no width"
    assert [line.split()[1] for line in out.splitlines() if line.startswith("random ")] == ["3"]


def test_an_interrupt_is_exit_code_130_and_leaves_no_model(shapo, files, tmp_path, monkeypatch):
    import shapo.training.engine as module

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "require_finite", interrupted)
    code, _, error = shapo(*train_arguments(files))
    assert (code, error) == (130, "shapo: interrupted\n")
    assert not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_full_disk_while_the_model_is_saved_leaves_no_model(shapo, files, tmp_path, monkeypatch):
    import errno

    from transformers import PreTrainedModel

    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    code, _, error = shapo(*train_arguments(files))
    assert (code, error.count("\n")) == (2, 1)
    assert "out/model: No space left on device" in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "reference.safetensors"]


def test_the_benchmark_checks_every_contender_and_writes_ratios(shapo, tmp_path):
    code, out, _ = shapo(
        "bench",
        "--layers",
        2,
        "--hidden",
        16,
        "--intermediate",
        32,
        "--percent",
        10,
        "--repeats",
        2,
        "--device",
        "cpu",
        "--quiet",
    )
    assert code == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["operators"]) == {"subspace update", "column cosine"}
    for rows in result["operators"].values():
        assert {row["name"] for row in rows if not row["eager"]} >= {"shapo, reference"}
        assert all(row["median_ms"] > 0 and row["repeats"] == 2 for row in rows)
    assert "speed against the best eager" in out


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
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
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
