"""What crosses the ranks: of the ascent's gradients the compact direction and nothing else, counted in bytes."""

import pytest
import torch

from tests.support.engines import AXES, INDICES, build
from tests.support.ranks import run_ranks

CASES = [
    {"engine": "ddp"},
    {"engine": "ddp", "options": {"ascent": "grad"}},
    {"engine": "fsdp"},
    {"engine": "fsdp1"},
    {"engine": "ddp", "options": {"sync": False}},
    {"engine": "fsdp", "options": {"sync": False}},
    {"engine": "tp"},
]
WEIGHTS = dict(build().named_parameters())
GRADIENTS = 8 * sum(p.numel() for p in WEIGHTS.values())
DIRECTION = 8 * sum(len(INDICES[n]) * WEIGHTS[n].numel() // WEIGHTS[n].shape[AXES[n]] for n in INDICES)


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    ranks = run_ranks(tmp_path_factory.mktemp("ranks"), 2, CASES, "rank_bytes.py")
    for results in ranks:
        assert results[0] == results[1]
    return [results[0] for results in ranks]


def of_kind(seen, *kinds):
    return [size for kind, size in seen if kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["selective", "grad"])
def test_under_ddp_the_ascent_sends_the_direction_and_the_descent_all_gradients(sent, number):
    assert sent[number]["ascent"] == [("allreduce", DIRECTION)]
    assert sent[number]["descent"] == [("allreduce", GRADIENTS)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3], ids=["fsdp2", "fsdp1"])
def test_under_fsdp_the_ascent_gathers_weights_as_a_descent_does_and_reduces_the_direction_alone(sent, number):
    ascent, descent = sent[number]["ascent"], sent[number]["descent"]
    assert of_kind(ascent, "allreduce") == [DIRECTION]
    assert of_kind(ascent, "reducescatter") == []
    assert sum(of_kind(ascent, "allgather")) >= GRADIENTS / 2
    assert sum(of_kind(ascent, "allgather")) <= sum(of_kind(descent, "allgather")) + max(of_kind(ascent, "allgather"))
    assert len(ascent) == 1 + len(of_kind(ascent, "allgather"))
    # The counter sees what an ordinary backward pass reduces.
    assert sum(of_kind(descent, "reducescatter")) >= GRADIENTS


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 5], ids=["ddp", "fsdp2"])
def test_without_sync_the_ascent_reduces_nothing(sent, number):
    assert of_kind(sent[number]["ascent"], "allreduce", "reducescatter") == []


@pytest.mark.slow
def test_under_tensor_parallelism_activations_are_added_up_and_norms_of_one_number_a_weight(sent):
    output = 8 * torch.Size([8, 6]).numel()  # of the down-projection, once forwards; nothing below needs a gradient
    norms, realised = 8 * len(INDICES), 8 * 3 * len(INDICES)
    assert sent[6]["ascent"] == [("allreduce", output)]
    assert sent[6]["descent"][:2] == [("allreduce", norms), ("allreduce", realised)]
