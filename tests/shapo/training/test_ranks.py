"""The loops on several ranks: an update is that of one process, under every engine."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch

from tests.support.ranks import run_ranks

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

SHAPO = {"rho": 0.5}
DDP = [
    {},
    {"kind": "sft"},
    {"shapo": SHAPO, "loss": {"aggregation": "drdpo", "nll": 0.3}},
    {"shapo": SHAPO, "loss": {"aggregation": "drdpo"}, "loop": {"accumulate": 1}},
    {"shapo": {**SHAPO, "ascent": "grad", "relative": True}, "loss": {"name": "reward_level"}},
    {"shapo": {**SHAPO, "perturbation": "delta", "per_micro_batch": True}, "loss": {"name": "simpo"}},
    {"shapo": {"rho": (0.2, 0.5), "norm": "none", "ascent_fraction": 0.5, "interval": 2}, "loss": {"nll": 0.3}},
    {
        "shapo": {**SHAPO, "reuse_prefix": True, "ascent_pairs": 1, "interval": 1},
        "subspace": {"model.layers.1.mlp.down_proj.weight": [1, 2, 40]},
        "loss": {"aggregation": "drdpo"},
    },
    {"shapo": SHAPO, "lora": True},
]
FSDP2 = [
    {},
    {"kind": "sft"},
    {"shapo": {**SHAPO, "interval": 2, "relative": True}, "loss": {"aggregation": "drdpo", "nll": 0.3}},
    {"shapo": {**SHAPO, "perturbation": "delta", "norm": "layer"}, "loss": {"name": "reward_level"}},
    {"shapo": {**SHAPO, "per_micro_batch": True, "ascent_pairs": 1}},
    {
        "shapo": {**SHAPO, "reuse_prefix": True, "ascent_pairs": 1, "interval": 1},
        "subspace": {"model.layers.1.mlp.down_proj.weight": [1, 2, 40]},
    },
    {"shapo": SHAPO, "lora": True, "tied": True},
]
ZERO = [
    {},
    {"kind": "sft"},
    {"shapo": {**SHAPO, "interval": 2, "relative": True}, "loss": {"aggregation": "drdpo", "nll": 0.3}},
    {"shapo": {**SHAPO, "per_micro_batch": True}, "loss": {"name": "reward_level"}},
]
CASES = [{"engine": "ddp", **case} for case in DDP] + [{"engine": "fsdp2", **case} for case in FSDP2]
if importlib.util.find_spec("deepspeed"):
    CASES += [{"engine": engine, "dtype": "float32", **case} for engine in ("zero2", "zero3") for case in ZERO]
FOUR = [case for case in CASES if case["engine"] != "zero2"][2::3]


def close(mine, other, **near):
    """Numbers, and whatever holds them, up to a tolerance."""
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            close(mine[key], other[key], **near)
    elif isinstance(mine, float) and not math.isnan(mine):
        assert mine == pytest.approx(other, **near)
    else:
        assert mine == other or (mine != mine and other != other)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    from tests.support.rank_training import train

    folder, found = tmp_path_factory.mktemp("alone"), {}

    def trained(case):
        key = json.dumps({name: value for name, value in case.items() if name not in ("engine", "folder")})
        if key not in found:
            found[key] = train(case, folder / str(len(found)))
        return found[key]

    return trained


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    results = {}
    for world, cases in ((2, CASES), (4, FOUR)):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        given = [{**case, "folder": str(folder / str(number))} for number, case in enumerate(cases)]
        results[world] = run_ranks(folder, world, given, "rank_training.py")
    return results


def named(value):
    return json.dumps(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("world", "case"), [(2, case) for case in CASES] + [(4, case) for case in FOUR], ids=named)
def test_ranks_train_as_one_process(world, case, alone, ranks):
    cases = CASES if world == 2 else FOUR
    (weights, lines), *others = ranks[world][cases.index(case)]
    expected, expected_lines = alone(case)
    near = {"rtol": 1e-5, "atol": 1e-6} if case.get("dtype") else {"rtol": 1e-9, "atol": 1e-11}
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], **near)
    assert len(lines) == len(expected_lines)
    for line, other in zip(lines, expected_lines, strict=True):
        close(line, other, rel=1e-4, abs=1e-5)
    assert all(saved == {} for saved, _ in others), "rank 0 alone saves"
