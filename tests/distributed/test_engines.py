"""Ranks move along one direction: gloo processes under every engine equal one process, whose update is written out."""

import pytest
import torch

from tests.support.engines import INDICES, build, one_process, one_process_of
from tests.support.ranks import run_ranks

#: Saved in the middle of an interval, by names through torch.distributed.checkpoint.
RESUMED = {"options": {"interval": 2, "relative": True}, "momentum": 0.9, "resumed": True}
#: Engine, options, and what else a case is about; each is run on as many ranks as its list says.
ON_TWO = [
    {"engine": "ddp", "options": {"perturbation": "in_place"}},
    {"engine": "ddp", "options": {"perturbation": "delta", "relative": True}, "accumulate": 2},
    {"engine": "ddp", "options": {"ascent": "grad"}, "accumulate": 2},
    {"engine": "ddp", "options": {"sync": False}},
    *({"engine": "ddp_static", "options": {"perturbation": perturbation}} for perturbation in ("in_place", "delta")),
    {"engine": "ddp_of_an_early_model"},
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
    *({"engine": engine, "width": width, **RESUMED} for engine, width in (("fsdp1", 7), ("tp", 8))),
]
# fully_shard's policies, and how near bfloat16 (spacing 1/128) and float16 (1/1024) must come.
HALVES = [
    ({"param_dtype": "bfloat16"}, {}, 0.01),
    ({"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "float32"}, {"relative": True}, 0.01),
    ({"param_dtype": "bfloat16", "cast_forward_inputs": False}, {}, 0.01),
    ({"param_dtype": "float16", "reduce_dtype": "float32"}, {"norm": "layer"}, 0.002),
]
IN_HALVES = [
    {
        "engine": "fsdp",
        "dtype": "float32",
        "inputs": "float32" if policy.get("cast_forward_inputs", True) else policy["param_dtype"],
        "policy": policy,
        "options": options,
    }
    for policy, options, _ in HALVES
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
    {"engine": "fsdp_tp", "width": 7, **RESUMED},
]


def named(case):
    rest = ", ".join(f"{key}={value}" for key, value in case.items() if key != "engine")
    return f"{case['engine']}: {rest}" if rest else case["engine"]


def run(folder, world, cases):
    checkpoints = [{"checkpoint": str(folder / str(i))} if case.get("resumed") else {} for i, case in enumerate(cases)]
    return run_ranks(folder, world, [{**case, **kept} for case, kept in zip(cases, checkpoints, strict=True)])


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, ON_TWO + IN_HALVES)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return run(tmp_path_factory.mktemp("four"), 4, ON_FOUR)


def check(case, results, ways):
    """One process is equalled, stats too; where each of `ways` parts of the batch has its own direction, weights.

    A run that was resumed is equalled to the bit.
    """
    parameters, stats = one_process_of(case, ways)
    for result in results:
        assert result["parameters"].keys() == parameters.keys()
        for name, expected in parameters.items():
            assert torch.equal(result["parameters"][name], results[0]["parameters"][name])
            torch.testing.assert_close(result["parameters"][name], expected, rtol=1e-12, atol=1e-13)
        assert ("resumed" in result) == case.get("resumed", False)
        for name, resumed in result.get("resumed", {}).items():
            assert torch.equal(resumed, result["parameters"][name])
        for key, expected in stats.items():
            assert result["stats"][key] == pytest.approx(expected, rel=1e-12), key


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=[named(case) for case in ON_TWO])
def test_two_ranks_equal_one_process(on_two, number):
    check(ON_TWO[number], on_two[number], 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_FOUR)), ids=[named(case) for case in ON_FOUR])
def test_four_ranks_equal_one_process(on_four, number):
    check(ON_FOUR[number], on_four[number], 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(HALVES)), ids=[str(policy) for policy, _, _ in HALVES])
def test_fully_sharded_weights_that_compute_in_16_bits_are_perturbed_as_their_precision_allows(on_two, number):
    _, options, near = HALVES[number]
    start = dict(build().named_parameters())
    parameters, stats = one_process(**options)
    unperturbed, _ = one_process(rhos=dict.fromkeys(INDICES, 0.0))

    def moved(parameters):
        return torch.cat([(parameters[name].double() - p).detach().flatten() for name, p in start.items()])

    expected = moved(parameters)
    assert (moved(unperturbed) - expected).norm() > 30 * near * expected.norm()  # so much is there to miss
    for result in on_two[len(ON_TWO) + number]:
        assert (moved(result["parameters"]) - expected).norm() < near * expected.norm()
        assert result["stats"]["epsilon_norm"] == pytest.approx(stats["epsilon_norm"], rel=near)
        assert result["stats"]["grad_norm"] == pytest.approx(stats["grad_norm"], rel=near)
        assert result["stats"]["realised_norm"] == pytest.approx(result["stats"]["epsilon_norm"], rel=near)
        assert result["stats"]["realised_norm"] != result["stats"]["epsilon_norm"]  # measured where it computes
        assert result["stats"]["realised_cosine"] > 1 - near**2
