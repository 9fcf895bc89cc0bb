"""`shapo sharpness`: its subspaces, its random controls and its radii."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import TOKENS


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
