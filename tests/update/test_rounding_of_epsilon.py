"""How much of eps reaches a bfloat16 forward pass: the published perturbation, SAM's radius in place, and delta."""

import pytest
import torch
from torch import nn

import shapo_kernels as sk
from benchmarks.rounding import rows
from shapo_kernels.update.stats import COSINE_WARNING


@pytest.fixture(scope="module")
def table():
    return {note or size: (size, found) for size, note, found in rows()}


def test_the_published_perturbation_hardly_reaches_the_forward_pass(table):
    published = [found for note, (_, found) in table.items() if str(note).startswith("published")]
    assert len(published) == 4
    for found in published:
        assert found["in_place"][2] < 0.15  # of the loss increase it was to cause
        assert found["delta"][0] > 0.9999


def test_about_half_of_sams_is_left_in_place_and_all_of_it_beside_the_weight(table):
    _, found = table["SAM, rho = 0.05 over 7 million elements"]
    assert 0.4 < found["in_place"][2] < 0.6
    assert found["delta"][2] == pytest.approx(1, abs=1e-3)
    # Stochastic rounding keeps all of it on average, in noise that is larger than it.
    assert found["stochastic"][2] == pytest.approx(1, abs=0.03)
    assert found["stochastic"][1] > 1.5


def test_the_warnings_threshold_parts_perturbations_that_keep_their_effect_from_those_that_do_not(table):
    for size, found in table.values():
        cosine, _, share = found["in_place"]
        assert (cosine >= COSINE_WARNING) == (share > 0.94), size


@pytest.mark.filterwarnings("ignore:the perturbation is lost")
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"rho": (2e-6, 4e-6), "norm": "none", "perturbation": "in_place"}, 0, 0.3),
        ({"rho": (2e-6, 4e-6), "norm": "none", "perturbation": "delta"}, 0.999, 1.001),
        ({"rho": 0.019, "perturbation": "in_place"}, 0.4, 0.8),
        ({"rho": 0.019, "perturbation": "delta"}, 0.999, 1.001),
    ],
    ids=["published", "published by delta", "SAM", "SAM by delta"],
)
def test_the_optimizers_stats_say_so(options, low, high):
    torch.manual_seed(0)
    linear = nn.Linear(1000, 1000, bias=False)
    linear.weight.data.normal_(std=0.02)
    linear.bfloat16()
    opt = sk.ShaPOOptimizer(
        torch.optim.SGD(linear.parameters(), lr=0.0), linear, sk.Subspace({"weight": range(999)}), **options
    )
    x = torch.randn(64, 1000).bfloat16()
    with opt.ascent():
        # Gradients of size 1, as of a sum over tokens.
        opt.ascend((linear(x).float() * torch.randn(64, 1000) / 8).sum())
    with opt.perturbed():
        pass
    stats = opt.stats
    share = stats["realised_cosine"] * stats["realised_norm"] / stats["epsilon_norm"]
    assert low <= share <= high
