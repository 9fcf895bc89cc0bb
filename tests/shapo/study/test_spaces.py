"""Subspaces of a study by their names."""

import pytest
import torch

from shapo.study.spaces import Spaces, by_layer, common, largest
from shapo_kernels import Subspace

WEIGHTS = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]


@pytest.fixture
def spaces(tiny_llama, tmp_path):
    """Scores that grow with the neuron's number, 0 to 63 in layer 0 and 64 to 127 in layer 1."""
    found = Spaces(tiny_llama, tmp_path)
    for name in ("gradient", "probe", "benign"):
        found.save(name, {WEIGHTS[0]: torch.arange(64.0), WEIGHTS[1]: torch.arange(64.0, 128.0)})
    return found


def chosen(space):
    return {64 * WEIGHTS.index(name) + int(i) for name in space.names for i in space[name]}


@pytest.mark.parametrize(
    ("name", "neurons"),
    [
        ("gradient-12.5", set(range(112, 128))),
        ("benign-12.5", set(range(112, 128))),
        ("probe-12.5", set(range(16))),
        ("opposite-12.5", set(range(112, 128))),
        ("outliers", {126, 127}),
        ("gradient-12.5-rest", set(range(112, 126))),
        ("layers-1-1", set(range(64, 128))),
        ("neurons", set(range(128))),
    ],
)
def test_a_name_says_which_neurons(spaces, name, neurons):
    assert chosen(spaces(name)) == neurons


def test_random_choices_are_as_large_and_matched_ones_lie_in_the_same_layers(spaces):
    assert len(chosen(spaces("random-12.5-3"))) == 16
    assert spaces("random-12.5-3") == spaces("random-12.5-3")
    assert spaces("random-12.5-3") != spaces("random-12.5-4")
    like = chosen(spaces("like-gradient-12.5-0"))
    assert len(like) == 16
    assert min(like) >= 64


def test_all_is_every_parameter(spaces, tiny_llama):
    assert spaces("all") == Subspace.full(tiny_llama)


def test_the_largest_neurons_and_the_layers_shares_add_up(spaces):
    scores = spaces.scores("gradient")
    total = sum(i * i for i in range(128))
    first = largest(scores, 2)
    assert [(one["weight"], one["neuron"]) for one in first] == [(WEIGHTS[1], 63), (WEIGHTS[1], 62)]
    assert first[0]["share"] == pytest.approx(127**2 / total)
    assert by_layer(scores) == pytest.approx(
        [sum(i * i for i in range(64)) / total, 1 - sum(i * i for i in range(64)) / total]
    )
    assert common(spaces("gradient-12.5"), spaces("gradient-12.5-rest")) == 14
