"""Ranks move along one direction: gloo processes under every engine equal one process, whose update is written out."""

import pytest
import torch
from engines import one_process
from ranks import run_ranks

#: Engine, options, and what else a case is about; each is run on as many ranks as its list says.
ON_TWO = [
    {"engine": "ddp", "options": {"perturbation": "in_place"}},
    {"engine": "ddp", "options": {"perturbation": "delta", "relative": True}, "accumulate": 2},
    {"engine": "ddp", "options": {"ascent": "grad"}, "accumulate": 2},
    {"engine": "ddp", "options": {"sync": False}},
    {"engine": "fsdp", "width": 7},
    {"engine": "fsdp", "options": {"relative": True, "norm": "layer"}, "rhos": {"up.weight": 0.2}},
    {"engine": "fsdp", "options": {"sync": False, "relative": True}},
    {"engine": "fsdp_ignoring", "options": {"relative": True}},
    {"engine": "tp"},
    {"engine": "tp", "width": 7, "options": {"perturbation": "delta"}, "accumulate": 2},
    {"engine": "tp", "options": {"perturbation": "delta", "relative": True}, "rhos": {"down.weight": 0.2}},
    {"engine": "tp", "options": {"ascent": "grad", "norm": "layer", "relative": True}, "accumulate": 2},
    {"engine": "tp", "width": 7, "options": {"perturbation": "in_place", "norm": "layer"}},
    {"engine": "tp_sequence", "clip": 0.1},
    {"engine": "tp_sequence", "options": {"perturbation": "delta", "relative": True}, "accumulate": 2},
    {"engine": "fsdp1", "width": 7, "options": {"relative": True}, "rhos": {"down.weight": 0.2}},
    {"engine": "fsdp1_zero2", "options": {"norm": "layer"}, "accumulate": 2},
    *({"engine": engine, "closure": True} for engine in ("ddp", "fsdp", "fsdp1", "tp")),
]
ON_FOUR = [
    {"engine": "fsdp", "width": 7, "options": {"relative": True}, "accumulate": 2},
    {"engine": "hsdp", "options": {"perturbation": "delta", "norm": "layer"}},
    {"engine": "tp", "width": 7, "options": {"relative": True}},
    {"engine": "tp", "width": 7, "options": {"perturbation": "delta", "norm": "layer", "relative": True}},
    {"engine": "fsdp_tp", "options": {"relative": True}, "accumulate": 2},
    {"engine": "fsdp_tp", "width": 7, "options": {"norm": "layer"}, "rhos": {"down.weight": 0.2}},
    {"engine": "fsdp_tp", "options": {"sync": False}},
    {"engine": "fsdp_tp", "closure": True},
    {"engine": "fsdp_tp", "width": 7, "clip": 0.1},
    {"engine": "fsdp_tp_sequence", "options": {"relative": True}, "clip": 0.1},
    {"engine": "fsdp1", "width": 7, "accumulate": 2},
    {"engine": "fsdp1_hybrid", "options": {"relative": True}},
]


def named(case):
    rest = ", ".join(f"{key}={value}" for key, value in case.items() if key != "engine")
    return f"{case['engine']}: {rest}" if rest else case["engine"]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("two"), 2, ON_TWO)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("four"), 4, ON_FOUR)


def check(case, results, ways):
    """One process is equalled, stats too; where each of ``ways`` parts of the batch has its own direction, weights."""
    options = case.get("options", {})
    own = 1 if options.get("sync", True) else ways
    norm, relative = options.get("norm", "global"), options.get("relative", False)
    parameters, stats = one_process(
        case.get("width", 8),
        norm=norm,
        relative=relative,
        rhos=case.get("rhos"),
        own_directions=own,
        clip=case.get("clip"),
    )
    for result in results:
        assert result["parameters"].keys() == parameters.keys()
        for name, expected in parameters.items():
            assert torch.equal(result["parameters"][name], results[0]["parameters"][name])
            torch.testing.assert_close(result["parameters"][name], expected, rtol=1e-12, atol=1e-13)
        for key, expected in stats.items() if own == 1 else ():
            assert result["stats"][key] == pytest.approx(expected, rel=1e-12), key


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=[named(case) for case in ON_TWO])
def test_two_ranks_equal_one_process(on_two, number):
    check(ON_TWO[number], on_two[number], 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_FOUR)), ids=[named(case) for case in ON_FOUR])
def test_four_ranks_equal_one_process(on_four, number):
    check(ON_FOUR[number], on_four[number], 2)
