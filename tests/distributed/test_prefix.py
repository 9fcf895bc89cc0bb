"""Ranks reuse the blocks below too: no bit of an update changes, and fully sharded blocks are gathered once less."""

import pytest
import torch

from tests.support.ranks import run_ranks

CASES = [
    {"engine": "ddp"},
    {"engine": "ddp", "wrap": {"find_unused_parameters": True}, "options": {"perturbation": "delta"}},
    {"engine": "ddp", "wrap": {"static_graph": True}},
    {"engine": "ddp", "closure": True},
    {"engine": "ddp", "options": {"ascent": "grad", "sync": False}},
    {"engine": "fsdp"},
    {"engine": "fsdp", "closure": True},
    {"engine": "fsdp", "wrap": {"reshard_after_forward": False}},
    {"engine": "fsdp", "wrap": {"checkpoint": True}},
    {"engine": "fsdp", "wrap": {"policy": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}}},
    {"engine": "tp"},
    {"engine": "ddp", "part": True},
    {"engine": "fsdp", "part": True},
    {"engine": "fsdp1", "refused": "whose hooks expect every block in every pass"},
]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("prefix"), 2, CASES, "rank_prefix.py")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[", ".join(map(str, case.values())) for case in CASES])
def test_on_two_ranks_reuse_changes_no_bit(on_two, number):
    case = CASES[number]
    for rank in on_two[number]:
        reusing, plain = rank["reusing"], rank["plain"]
        if "refused" in case:
            assert case["refused"] in reusing
            assert "\n" not in reusing
            continue
        assert reusing["blocks"] == 2
        for name, expected in plain["parameters"].items():
            if case.get("part"):  # one row alone rounds otherwise than beside another
                torch.testing.assert_close(reusing["parameters"][name], expected, rtol=1e-12, atol=1e-13)
            else:
                assert torch.equal(reusing["parameters"][name], expected), name
        if case["engine"] == "fsdp" and "part" not in case and case.get("wrap", {}).get("reshard_after_forward", True):
            # Three updates of two micro-batches (one, by a closure), in each of which two blocks are not gathered for
            # the descent's forward pass.
            assert plain["collectives"] - reusing["collectives"] >= 3 * 2
