"""Recipes: the shipped ones run, the command line wins, and what cannot be meant is one line."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from shapo.cli import _groups, main
from shapo.models.loading import load_model
from shapo.recipe import COMMANDS, PRESETS, expand
from shapo.training.metrics import read_metrics
from shapo_kernels import Subspace

GROUPS = {name: _groups(name) for name in COMMANDS}
SHORT = ["--updates", "2", "--batch-size", "4", "--quiet"]
TOKENS = ["--max-length", "96"]

# What each shipped recipe is used with, besides model, data and output.
USES = {
    "dpo": ["train", *SHORT, *TOKENS],
    "published": ["train", *SHORT, *TOKENS, "--interval", "1", "--subspace", "{files}/subspace.safetensors"],
    "shapo-probe": ["train", *SHORT, *TOKENS, "--interval", "1", "--subspace", "{files}/subspace.safetensors"],
    "shapo-gradient": ["train", *SHORT, *TOKENS, "--interval", "1", "--subspace", "{files}/subspace.safetensors"],
    "sam": ["train", *SHORT, *TOKENS],
    "shapo-head": ["train", *SHORT, *TOKENS],
    "reward-level": [
        "train", *SHORT, *TOKENS, "--interval", "1", "--subspace", "{files}/subspace.safetensors",
        "--reward-model", "{files}/reward",
    ],
    "noise": ["train", *SHORT, *TOKENS, "--interval", "1", "--subspace", "{files}/subspace.safetensors"],
    "qlora": ["train", *SHORT, *TOKENS],
    "published-probe": ["probe", *TOKENS, "--epochs", "2", "--quiet"],
    "select-probe": ["select", *TOKENS, "--percent", "10", "--probe", "{files}/probe/probe.safetensors"],
    "select-gradient": ["select", *TOKENS, "--percent", "10", "--quiet"],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, _tiny_llama, tiny_tokenizer, synthetic_rows):
    from transformers import LlamaForSequenceClassification

    from tests.support.llamas import llama

    folder = tmp_path_factory.mktemp("recipes")
    size = {"vocab_size": len(tiny_tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    reward = llama(
        LlamaForSequenceClassification, seed=1, **size, num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id
    )
    for name, model in {"model": _tiny_llama, "reward": reward}.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows["train"]))
    Subspace({"model.layers.0.mlp.down_proj.weight": [1, 2, 30]}).save(folder / "subspace.safetensors")
    data = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    assert main(["probe", *data, *TOKENS, "--epochs", "2", "--quiet", "--output", str(folder / "probe")]) == 0
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder with the model and the data; gives exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def shapo(command: str, *more: str, data: bool = True) -> tuple[int, str]:
        given = ["--model", f"{files}/model", "--data", f"{files}/train.jsonl"] if data else []
        code = main([command, *given, *(text.format(files=files) for text in more)])
        told = [line for line in capsys.readouterr().err.splitlines(keepends=True) if "has a chat template" not in line]
        return code, "".join(told)

    return shapo


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_shipped_recipe_runs_on_a_tiny_model(name, run, files, tmp_path):
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    command, *more = USES[name]
    if name == "select-probe":
        more = ["--model", "{files}/model", *more]
    code, error = run(command, "--config", name, "--output", "out", *more, data=name != "select-probe")
    assert code == 0, error
    told = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    on_line = {text[2:].replace("-", "_") for text in more if text.startswith("--")}
    written = tmp_path / ("out.recipe.yaml" if command == "select" else "out/recipe.yaml")
    kept = yaml.safe_load(written.read_text())
    assert {key: kept[key] for key in told if key not in on_line} == {k: v for k, v in told.items() if k not in on_line}
    if command == "train":
        updates = read_metrics("out/metrics.jsonl", "update")
        assert len(updates) == 2
        assert all(("shapo" in update) == ("rho" in told) for update in updates)


def test_the_published_recipe_does_not_normalise_and_draws_its_factor(run):
    assert run("train", "--config", "published", "--output", "out", *USES["published"][1:])[0] == 0
    for update in read_metrics("out/metrics.jsonl", "update"):
        stats = update["shapo"]
        assert 2e-6 * 0.999 <= stats["epsilon_norm"] / stats["grad_norm"] <= 4e-6 * 1.001


def test_the_merged_recipe_runs_the_command_again_to_the_same_bits(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\nbatch-size: 4\nupdates: 3\nnoise: 0.25\nseed: 7\nquiet: true\n")
    assert run("train", "--config", "mine.yaml", *TOKENS, "--seed", "8", "--output", "first")[0] == 0
    assert run("train", "--config", "first/recipe.yaml", "--output", "second", data=False)[0] == 0
    assert (tmp_path / "first/recipe.yaml").read_text().startswith("# shapo train --config first/recipe.yaml\n")
    first, second = (load_model(f"{name}/model").state_dict() for name in ("first", "second"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    kept = [yaml.safe_load((tmp_path / name / "recipe.yaml").read_text()) for name in ("first", "second")]
    assert kept[0] | {"output": "second"} == kept[1]
    assert (kept[0]["seed"], kept[0]["lr"], kept[0]["batch_size"]) == (8, 1e-3, 4)


def arguments(tmp_path, command: str, text: str, *more: str) -> list[str]:
    (tmp_path / "r.yaml").write_text(text)
    return expand([command, "--config", str(tmp_path / "r.yaml"), *more], GROUPS)[1 : -2 - len(more)]


def test_the_command_line_wins(tmp_path):
    recipe = "lr: 1e-3\nrelative_rho: true\nascent_fraction: 0.5\nepochs: 2\n"
    assert arguments(tmp_path, "train", recipe) == [
        "--lr=1e-3",
        "--relative-rho",
        "--ascent-fraction=0.5",
        "--epochs=2",
    ]
    # --ascent-pairs excludes --ascent-fraction; --no-relative-rho takes back a flag.
    more = ["--lr=5", "--no-relative-rho", "--ascent-pairs", "3"]
    assert arguments(tmp_path, "train", recipe, *more) == ["--epochs=2"]


def test_values_are_read_as_yaml_writes_them(tmp_path):
    recipe = "rho: [2.0e-6, 4e-6]\nfused_head: on\nlimit: 3\nsplit: null\nbf16: false\nmodel: -x\nepochs: 1\nlr: .5\n"
    wanted = ["--rho=2e-06,4e-6", "--fused-head=on", "--limit=3", "--model=-x", "--epochs=1", "--lr=0.5"]
    assert arguments(tmp_path, "train", recipe) == wanted
    assert arguments(tmp_path, "evaluate", "verdicts: [a, b]") == ["--verdicts=a", "--verdicts=b"]
    assert arguments(tmp_path, "evaluate", "verdicts: [a, b]", "--verdicts", "c") == []
    assert arguments(tmp_path, "train", "# nothing\n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 3", "r.yaml: train has no option bach_size; did you mean batch_size?"),
        ("learning_rate: 3", "r.yaml: train has no option learning_rate; did you mean lr?"),
        ("xyzzy: 3", "r.yaml: train has no option xyzzy; `shapo train --help` lists those it has"),
        ("percent: 3", "r.yaml: percent is an option of select, not of train"),
        ("held_out: 3", "held_out is an option of sft, attack, not of train"),
        ("epochs: 1.5", "epochs is 1.5, but a whole number is expected"),
        ("epochs: '2'", "epochs is '2', but a whole number is expected"),
        ("epochs: true", "epochs is True, but a whole number is expected"),
        ("epochs:", "epochs is None, but a whole number is expected"),
        ("lr: fast", "lr is 'fast', but a number is expected"),
        ("lr: [1, 2]", "lr is [1, 2], but a number is expected"),
        ("limit: 0", "limit is '0', but a whole number of at least 1 is expected"),
        ("rho: {a: 1}", "rho is {'a': 1}, but a number, or several, is expected"),
        ("model: 7", "model is 7, but text (in quotes) is expected"),
        ("bf16: 1", "bf16 is 1, but true or false is expected"),
        ("loss: dop", "loss is 'dop', but one of dpo, cdpo"),
        ("optimizer: rmspop", "did you mean rmsprop?"),
        ("resume: true", "resume belongs on the command line"),
        ("config: other.yaml", "config belongs on the command line"),
        ("on: 1", "train has no option True"),
        ("lr: 1\nlr: 2", "has lr twice"),
        ("batch-size: 1\nbatch_size: 2", "has batch_size twice"),
        ("- lr", "r.yaml is a list, but lines of `option: value` are expected"),
        ("lr: [", "r.yaml is not YAML in line"),
        ("lr: !!python/object:os.system 1", "is not YAML in line 1: could not determine a constructor"),
    ],
)
def test_an_impossible_recipe_gives_one_line(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    assert main(["train", "--config", "r.yaml", "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_names_the_shipped_ones(run):
    code, error = run("train", "--config", "publishd", "--output", "out")
    assert (code, "there is no recipe publishd: give a YAML file, or one of dpo, noise, published" in error) == (
        2,
        True,
    )


def test_every_command_of_a_run_takes_a_recipe(capsys):
    for command in COMMANDS:
        assert main([command, "--config", "no.yaml"]) == 2
        assert "there is no recipe no.yaml" in capsys.readouterr().err
