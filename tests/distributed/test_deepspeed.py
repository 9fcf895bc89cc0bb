"""DeepSpeed's own engine, ZeRO-0 to ZeRO-3 on two and four gloo ranks, equals one process, whose update is written out.

ZeRO keeps float32 masters of whatever it is given, so the equality is float32's.
"""

import importlib.util
import re

import pytest
import torch

from tests.support.engines import RHO, one_process, one_process_of
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

PERSISTENT_OR_NOT = {"stage3_param_persistence_threshold": 10, "sub_group_size": 20}
OFFLOADED = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}}
ON_TWO = [
    {"stage": 0, "accumulate": 2},
    {"stage": 1, "options": {"relative": True}, "clip": 0.1},
    {"stage": 1, "options": {"perturbation": "in_place"}},
    {"stage": 2, "options": {"perturbation": "delta"}, "accumulate": 2, "rhos": {"up.weight": 0.2}},
    {"stage": 2, "options": {"relative": True}, "zero": {"offload_optimizer": {"device": "cpu"}}},
    {"stage": 3, "width": 7, "options": {"relative": True}, "clip": 0.1},
    {"stage": 3, "options": {"relative": True, "norm": "layer"}, "accumulate": 2, "zero": PERSISTENT_OR_NOT},
    {"stage": 3, "accumulate": 2, "rhos": {"down.weight": 0.2}, "zero": PERSISTENT_OR_NOT},
    {"stage": 3, "options": {"relative": True}, "zero": OFFLOADED},
    {"stage": 3, "leaves": True, "accumulate": 2},
    {"stage": 3, "options": {"sync": False}},
    {"stage": 0, "config": BF16, "rhos": {"up.weight": 0.2}},
    {"stage": 1, "config": BF16},
    {"stage": 1, "config": {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, "rhos": {"up.weight": 0.2}},
    {"stage": 2, "config": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}},
    {"stage": 3, "config": BF16, "options": {"relative": True}},
]
ON_FOUR = [
    {"stage": 2, "width": 7, "options": {"relative": True}, "accumulate": 2},
    {"stage": 3, "width": 7, "options": {"relative": True}},
]
OTHERS = [
    {"run": "resume", "stage": 1, "base": "AdamW", "options": {"interval": 2}},
    {"run": "resume", "stage": 3, "base": "AdamW", "options": {"interval": 2, "relative": True}},
    {"run": "frozen", "stage": 3},
    {"run": "messages", "stage": 3},
    {"run": "messages", "stage": 1},
]


def named(case):
    return ", ".join(f"{key}={value}" for key, value in case.items())


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    others = [{**case, "folder": str(folder / f"checkpoint{number}")} for number, case in enumerate(OTHERS)]
    return run_ranks(folder, 2, ON_TWO + others, "rank_deepspeed.py")


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("four"), 4, ON_FOUR, "rank_deepspeed.py")


def check(case, results):
    parameters, stats = one_process_of(case, len(results))
    weights_within, stats_within = (2**-7, 2**-7) if "config" in case else (1e-6, 1e-6)
    for result in results:
        assert result["updates"] == 3
        assert result["parameters"].keys() == parameters.keys()
        for name, expected in parameters.items():
            assert torch.equal(result["parameters"][name], results[0]["parameters"][name])
            torch.testing.assert_close(
                result["parameters"][name].double(), expected, rtol=weights_within, atol=weights_within
            )
        for key, expected in stats.items():
            assert result["stats"][key] == pytest.approx(expected, rel=stats_within), key


@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=[named(case) for case in ON_TWO])
def test_two_ranks_equal_one_process(on_two, number):
    check(ON_TWO[number], on_two[number])


@pytest.mark.parametrize("number", range(len(ON_FOUR)), ids=[named(case) for case in ON_FOUR])
def test_four_ranks_equal_one_process(on_four, number):
    check(ON_FOUR[number], on_four[number])


@pytest.mark.parametrize("number", [0, 1], ids=["ZeRO-1", "ZeRO-3"])
def test_a_checkpoint_of_the_engine_in_the_middle_of_an_interval_resumes_to_the_bit(on_two, number):
    for rank in on_two[len(ON_TWO) + number]:
        assert rank["updates"] == (5, 5)
        for name, expected in rank["straight"].items():
            assert torch.equal(rank["resumed"][name], expected), name


def test_frozen_weights_are_perturbed_under_zero_3(on_two):
    for rank in on_two[len(ON_TWO) + 2]:
        assert rank["stats"]["epsilon_norm"] == pytest.approx(RHO, rel=1e-6)
        assert rank["stats"]["realised_cosine"] == pytest.approx(1, abs=1e-6)
    # The gradient of the trained head at theta + eps, which is an ordinary process's.
    expected, _ = one_process(updates=1)
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(rank["parameters"][name].double(), expected[name], rtol=1e-6, atol=1e-6)


FIRST = r"make the engine first, then ShaPOOptimizer\(engine.optimizer, engine, …\)$"
SAID = {
    "module": rf"^the model cannot be perturbed: DeepSpeed has its parameters: {FIRST}",
    "inside": rf"^the model cannot be perturbed: a DeepSpeed engine is inside it: pass the engine itself: {FIRST}",
    "other base": r"^base_optimizer is a SGD that does not step the engine: pass the optimizer that .* returned",
    "no base": r"^base_optimizer is a NoneType that does not step the engine",
    "engine's base": rf"^base_optimizer is a DeepSpeedZeroOptimizer\w* and the model no engine: {FIRST}",
    "grad": r"^DeepSpeed keeps the gradients in partitions of its own: use ascent='selective'$",
    "closure": r"^DeepSpeed's engine takes gradients by engine.backward\(loss\) .* without a closure or scaler$",
    "by hand": r"^DeepSpeed keeps the gradients in partitions of its own: use `with opt.ascent\(\):` instead$",
    "state_dict": r"^DeepSpeed saves an engine's optimizer: engine.save_checkpoint\(folder, client_state=",
    "second": r"^the engine's step is another ShaPOOptimizer's: call its detach\(\) first$",
    "backward in an ascent": r"^engine.backward\(loss\) inside .* hand the loss over by opt.ascend\(loss\)$",
    "no ascent": r"^this update is due and had no ascent",
    "wrapped before": rf"^DeepSpeed has its parameters: {FIRST}",
}


@pytest.mark.parametrize("number", [3, 4], ids=["ZeRO-3", "ZeRO-1"])
def test_other_uses_of_an_engine_are_refused_in_one_line(on_two, number):
    for said in on_two[len(ON_TWO) + number]:
        assert said.keys() == SAID.keys()
        for case, message in said.items():
            assert "\n" not in message
            assert re.search(SAID[case], message), message
