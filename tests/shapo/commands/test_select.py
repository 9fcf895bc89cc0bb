"""`shapo select` and `shapo probe`: what they count and tell, and bad input in one line."""

from __future__ import annotations

import re

import pytest

from tests.support.commands import TOKENS


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


def test_an_unknown_model_type_is_refused_naming_the_known_ones(shapo, files, tmp_path, tiny_tokenizer):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=len(tiny_tokenizer), hidden_size=8, n_layer=1, n_head=2)).save_pretrained(
        "b"
    )
    code, _, error = shapo("select", "--method", "random", "--model", "b", "--output", "s.safetensors")
    assert (code, error.count("\n")) == (2, 1)
    assert "model type 'bloom' is not supported" in error
    assert "llama" in error
