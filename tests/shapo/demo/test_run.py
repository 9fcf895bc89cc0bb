"""The demo from end to end in its reduced size."""

from __future__ import annotations

import json

import pytest

from shapo.cli import main
from shapo.demo.settings import methods
from shapo.training.metrics import read_metrics
from shapo_kernels import Subspace

NUMBERS = ("flips_fitted", "increase", "seconds_per_update")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--size", "small", "--jobs", "1", "--device", "cpu", "--output", str(folder), "--quiet"]) == 0
    return folder


def test_every_method_is_measured(demo):
    report = json.loads((demo / "report.json").read_text())
    assert [row["name"] for row in report["methods"]] == [method.name for method in methods()]
    for row in report["methods"]:
        assert all(isinstance(row[key], float) for key in NUMBERS)
        assert row["test"]["accuracy"]["n"] == row["unseen"]["accuracy"]["n"] == 32
        assert (row["rho_over_weight_norm"] is None) == (row["subspace"] is None)
        lines = read_metrics(demo / "methods" / row["slug"] / "metrics.jsonl", "update")
        assert all(("shapo" in line) == (row["subspace"] is not None) for line in lines)


def test_all_methods_start_from_a_tie_in_every_pair(demo):
    for method in methods():
        start = read_metrics(demo / "methods" / method.slug / "metrics.jsonl", "evaluation")[0]
        assert (start["update"], start["ties"], start["flips_fitted"]["value"]) == (0, 16, 0.5), method.name


def test_token_and_reward_level_have_each_selection_and_plain_training(demo):
    found = {(method.reward_level, method.subspace) for method in methods()}
    assert found == {(level, s) for level in (False, True) for s in (None, "probe", "gradient", "random", "all")}


def test_subspaces_of_a_comparison_are_equally_large(demo):
    counts = {Subspace.load(path).count for path in (demo / "subspaces").iterdir()}
    assert counts == {round(0.10 * 128)}


def test_the_final_model_reloads_and_generates(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(demo / "model"),
        AutoTokenizer.from_pretrained(demo / "model"),
    )
    tokens = tokenizer("\n\nHuman: hello\n\nAssistant:", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] > tokens["input_ids"].shape[1]


def test_the_page_stands_beside_the_report(demo):
    page = (demo / "report.html").read_text()
    assert "What this does not show" in page
    assert "ShaPO, critical by gradient" in page


def test_the_report_states_seed_limits_and_the_check_of_the_unseen_split(demo):
    text = (demo / "report.md").read_text()
    for part in (
        "seed 0",
        "One seed.",
        "Unseen categories, checked with plain DPO",
        "CLEAN labels",
        "What this does not show",
        "of the first 16 test pairs, in the table of all 32",
        'that of the row "ShaPO, critical by probe"',
    ):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith(("| ShaPO", "| DPO"))]
    assert len({line.count("|") for line in rows}) == 1


def test_plots_and_data_are_there(demo):
    for name in ("training.png", "sharpness.png", "probe.png"):
        assert (demo / name).read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in (demo / "data").iterdir()} == {"sft", "train", "selection", "test", "test_unseen"}
    assert not list(demo.rglob(".*"))


def test_the_data_it_leaves_are_input_for_the_other_commands(demo, tmp_path, capsys):
    arguments = [
        "--model",
        demo / "model",
        "--reference",
        demo / "sft" / "model",
        "--data",
        demo / "data" / "test.jsonl",
    ]
    assert main(["evaluate", *map(str, arguments), "--output", str(tmp_path / "e.json"), "--quiet"]) == 0
    accuracy = json.loads((tmp_path / "e.json").read_text())["preferences"]["accuracy"]["value"]
    report = json.loads((demo / "report.json").read_text())
    (row,) = [row for row in report["methods"] if row["slug"] == "shapo-probe"]
    assert accuracy == row["test"]["accuracy"]["value"]
