"""ShaPO in a Trainer and in an Accelerate loop: two ranks do what one process does with the same pairs (S12, S13)."""

from __future__ import annotations

import functools
import importlib.util
import json

import pytest
import torch

from tests.support.ranks import run_ranks

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

# Its clip_grad_norm_ takes no float64, its whole state dicts cannot be of a CPU, and of sharded checkpoints Accelerate
# restores no optimizer's state under it, a plain AdamW's neither.
FSDP1 = {
    "engine": "fsdp1",
    "fsdp_config": {"sync_module_states": "false", "state_dict_type": "SHARDED_STATE_DICT"},
    "dtype": "float32",
    "optim": "sgd",
}
# A run that resumes starts in the middle of an interval.
TRAINERS = [
    {"engine": "ddp"},
    {"engine": "ddp", "options": {"ascent": "grad"}},
    {"engine": "ddp", "options": {"perturbation": "delta", "interval": 2}, "resume": True},
    {"engine": "fsdp2", "options": {"interval": 2, "relative": True}, "resume": True},
    {
        "engine": "fsdp2",
        "options": {"interval": 2},
        "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
        "resume": True,
    },
    {"engine": "fsdp2", "fsdp_config": {"activation_checkpointing": True}},
    {**FSDP1, "options": {"interval": 2}, "resume": True},
]
# trl's own head computes in float32.
DPO = [
    {"engine": "ddp", "fused_head": "on"},
    {"engine": "fsdp2", "options": {"interval": 2, "relative": True}, "fused_head": "on", "resume": True},
    {"engine": "fsdp2", "dtype": "float32", "optim": "sgd"},
    {**FSDP1, "options": {"relative": True}},
    {"engine": "fsdp2", "adapter": True, "optim": "sgd", "dtype": "float32", "fused_head": "auto"},
]
LOOPS = [
    {"engine": "ddp", "each": False},
    {"engine": "ddp", "each": True},
    {"engine": "ddp", "each": False, "options": {"ascent": "grad"}},
    {"engine": "fsdp2", "each": False, "options": {"interval": 2, "relative": True}, "resume": True},
    {"engine": "fsdp2", "each": True},
    {"engine": "fsdp1", "each": False, "options": {"interval": 2}, "dtype": "float32", "optim": "sgd", "resume": True},
    {"engine": "fsdp1", "each": True, "dtype": "float32"},
]
if importlib.util.find_spec("deepspeed"):
    TRAINERS += [
        {"engine": "zero2"},
        {"engine": "zero3", "options": {"interval": 2, "relative": True}, "resume": True},
    ]
    DPO += [
        {"engine": "zero2", "fused_head": "on", "optim": "sgd"},
        {"engine": "zero3", "fused_head": "auto", "options": {"interval": 2}, "optim": "sgd", "resume": True},
        {
            "engine": "zero3",
            "adapter": True,
            "optim": "sgd",
            "dtype": "float32",
            "arguments": {"bf16": False, "activation_checkpointing": False},
        },
    ]
    LOOPS += [
        {"engine": "zero1", "each": True},
        {"engine": "zero2", "each": False},
        {"engine": "zero3", "each": False, "options": {"interval": 2, "relative": True}, "resume": True},
    ]
CASES = [
    {"kind": kind, **case} for kind, cases in {"trainer": TRAINERS, "dpo": DPO, "loop": LOOPS}.items() for case in cases
]


def named(case):
    return ", ".join(str(value) for key, value in case.items() if key != "resume")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What one process has at the end, and what each of two ranks has."""
    from tests.support.rank_integrations import train

    folder = tmp_path_factory.mktemp("ranks")
    cases = [{**case, "folder": str(folder / str(number))} for number, case in enumerate(CASES)]
    ranks = run_ranks(folder, 2, cases, "rank_integrations.py")

    @functools.cache
    def alone(what):
        return train({**json.loads(what), "engine": "none", "folder": str(folder / "alone")})

    of_engines = ("engine", "fsdp_config", "resume")
    return [alone(json.dumps({k: v for k, v in case.items() if k not in of_engines})) for case in CASES], ranks


@pytest.mark.parametrize("number", range(len(CASES)), ids=[named(case) for case in CASES])
def test_on_two_ranks_it_equals_one_process_and_resumes_to_the_bit(ends, number):
    (alone,), ranks = ends[0][number], ends[1][number]
    # ZeRO keeps float32 masters of whatever it is given.
    lower = "dtype" in CASES[number] or CASES[number]["engine"].startswith("zero")
    near = {"rtol": 1e-5, "atol": 1e-6} if lower else {"rtol": 1e-9, "atol": 1e-11}
    for results in ranks:
        first = results[0]
        assert first["updates"] == alone["updates"]
        assert first["parameters"].keys() == alone["parameters"].keys()
        for name, expected in alone["parameters"].items():
            torch.testing.assert_close(first["parameters"][name], expected, **near)
            assert all(torch.equal(later["parameters"][name], first["parameters"][name]) for later in results[1:])
        assert all(later["updates"] == first["updates"] for later in results[1:])
        assert len(results) == 1 + CASES[number].get("resume", False)
        for mine, other in zip(first.get("logs", []), alone.get("logs", []), strict=True):
            assert mine == pytest.approx(other, rel=2e-3, abs=1e-5)  # the Trainer logs losses in float32
        assert bool(first.get("logs")) == (CASES[number]["kind"] != "loop")


def test_the_ways_to_share_a_perturbation_differ(ends):
    one, each = (ends[0][CASES.index({"kind": "loop", "engine": "ddp", "each": each})][0] for each in (False, True))
    assert not torch.equal(one["parameters"]["0.weight"], each["parameters"]["0.weight"])
