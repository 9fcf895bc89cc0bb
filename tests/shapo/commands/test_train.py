"""`shapo train`: what it writes, what it tells, and bad input: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from shapo.training.metrics import read_metrics
from shapo_kernels import Subspace
from tests.support.commands import DOWN, TOKENS, train_arguments


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
        (["--config", "noise"], "rho (of the recipe noise, or --rho) needs --subspace"),
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
        (
            ["--updat", "3"],
            "unrecognized arguments: --updat 3; did you mean --updates? (see shapo train --help)",
        ),
        (["--learning-rate=1"], "unrecognized arguments: --learning-rate=1; did you mean --lr?"),
        (["xyzzy", "--xyzzy"], "unrecognized arguments: xyzzy --xyzzy (see shapo train --help)"),
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


def test_a_radius_that_breaks_the_model_is_told_once(shapo, files):
    for rho, told in ((0.1, 0), (1e4, 1)):
        more = ["--rho", rho, "--subspace", "full", "--interval", 1, "--lr", 1e-9, "--overwrite"]
        code, _, error = shapo(*train_arguments(files, *more))
        assert code == 0
        gaps = [row["gap"] for row in read_metrics("out/metrics.jsonl", "update")]
        # Ten times what DPO's loss is for a model that prefers nothing.
        assert [gap > 10 * math.log(2) for gap in gaps] == [bool(told)] * 2
        assert error.count("shapo: note: the perturbation raises the loss by") == told
        assert (f"raises the loss by {gaps[0]:.3g} (`gap`" in error) == bool(told)
        assert error.count("a model that prefers nothing has 0.693") == told
        assert error.count("see `shapo sharpness`") == told


def test_a_finished_run_that_is_resumed_is_told(shapo, files):
    for more, told in ((["--save-every", 1], False), (["--save-every", 1, "--resume"], True)):
        code, _, error = shapo(*train_arguments(files, *more))
        assert code == 0
        assert ("shapo: note: all 2 updates were made before: nothing is left to train" in error) == told


def test_a_short_length_alone_is_no_mistake(shapo, files):
    arguments = [part for part in train_arguments(files) if part not in TOKENS]
    assert shapo(*arguments, "--max-length", 48)[0] == 0
    code, _, error = shapo(*arguments, "--overwrite", "--max-length", 48, "--max-prompt-length", 48)
    assert code == 2
    assert "expected 0 < prompt < whole" in error


def test_a_subspace_without_a_neuron_is_one_line(shapo, files, tmp_path):
    Subspace({}).save(tmp_path / "none.safetensors")
    perturbed = ["--rho", 0.1, "--subspace", tmp_path / "none.safetensors"]
    pairs = ["--model", files / "model", "--data", files / "test.jsonl", "--limit", 2, *TOKENS, "--quiet"]
    for command in (train_arguments(files, *perturbed), ["sharpness", *pairs, *perturbed[2:], "--output", "out"]):
        code, _, error = shapo(*command)
        assert (code, error.count("\n")) == (2, 1)
        assert "selects no neuron" in error


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


def test_a_subspace_with_a_neuron_twice_is_refused(shapo, files, tmp_path):
    from safetensors.torch import load_file, save_file

    with open(files / "subspace.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    tensors = load_file(files / "subspace.safetensors")
    save_file({name: torch.tensor([1, 1, 2]) for name in tensors}, tmp_path / "twice.safetensors", metadata=header)
    code, _, error = shapo(*train_arguments(files, "--rho", 0.1, "--subspace", "twice.safetensors"))
    assert (code, error.count("\n")) == (2, 1)
    assert "1 twice" in error


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
