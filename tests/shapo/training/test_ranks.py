"""The loops on several ranks: an update is that of one process, under every engine."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

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
    {"shapo": SHAPO, "lora": True, "tied": True},
]
CASES = [{"engine": "ddp", **case} for case in DDP] + [{"engine": "fsdp2", **case} for case in FSDP2]
if importlib.util.find_spec("deepspeed"):
    CASES += [{"engine": engine, "dtype": "float32", **case} for engine in ("zero2", "zero3") for case in ZERO]
LASTING = {
    "shapo": {"rho": (0.2, 0.5), "norm": "none", "interval": 2},
    "loop": {"optimizer": "adamw", "lr": 1e-2, "save_every": 3},
}
DROPOUT = {**LASTING, "loop": {**LASTING["loop"], "dropout": True}, "dropout": 0.2, "again": True}
ENGINES = sorted({case["engine"] for case in CASES})
RESUMED = [{**DROPOUT, "engine": engine} for engine in ENGINES]
RESUMED.append({**DROPOUT, "engine": "fsdp2", "kind": "sft"})
FAILING = [
    {"engine": "fsdp2", "fails": "adafactor cannot step a part of a weight", "loop": {"optimizer": "adafactor"}},
    {
        "engine": "fsdp2",
        "fails": "SubspaceError: the selected weights are sharded",
        "shapo": {**SHAPO, "ascent": "grad"},
    },
]
STARTING = [{"engine": engine, "starts": True} for engine in ENGINES if engine in ("fsdp2", "zero3")]
MOVED = {**LASTING, "engine": "fsdp2"}
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

    home, found = tmp_path_factory.mktemp("alone"), {}

    def trained(case, folder=None):
        key = json.dumps([{name: value for name, value in case.items() if name != "engine"}, str(folder)])
        if key not in found:
            found[key] = train(case, folder or home / str(len(found)), resume=folder is not None)
        return found[key]

    return trained


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Number of ranks and case -> what each rank's runs saved and logged; and the folder of `MOVED` on two ranks."""
    folders = {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (2, 4)}
    two = [*CASES, *RESUMED, *FAILING, *STARTING, MOVED]
    given = [{**case, "folder": str(folders[2] / str(number))} for number, case in enumerate(two)]
    results = run_ranks(folders[2], 2, given, "rank_training.py")
    left = folders[2] / str(len(two) - 1)
    shutil.copytree(left, folders[4] / "moved")
    given = [{**case, "folder": str(folders[4] / str(number))} for number, case in enumerate(FOUR)]
    given.append({**MOVED, "folder": str(folders[4] / "moved"), "resume": True})
    more = run_ranks(folders[4], 4, given, "rank_training.py")
    named = [((2, repr(case)), runs) for case, runs in zip(two, results, strict=True)]
    named += [((4, repr(case)), runs) for case, runs in zip([*FOUR, MOVED], more, strict=True)]
    return dict(named), left


def named(value):
    return json.dumps(value) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("world", "case"), [(2, case) for case in CASES] + [(4, case) for case in FOUR], ids=named)
def test_ranks_train_as_one_process(world, case, alone, ranks):
    ((weights, lines),), *others = ranks[0][world, repr(case)]
    expected, expected_lines = alone(case)
    near = {"rtol": 1e-5, "atol": 1e-6} if case.get("dtype") else {"rtol": 1e-9, "atol": 1e-11}
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], **near)
    assert len(lines) == len(expected_lines)
    for line, other in zip(lines, expected_lines, strict=True):
        close(line, other, rel=1e-4, abs=1e-5)
    assert all(saved == {} for ((saved, _),) in others), "rank 0 alone saves"


@pytest.mark.parametrize("case", RESUMED, ids=named)
def test_ranks_go_on_to_the_bit(case, ranks):
    (whole, again), *_ = ranks[0][2, repr(case)]
    assert whole[0].keys() == again[0].keys()
    assert all(torch.equal(weight, again[0][name]) for name, weight in whole[0].items())
    assert whole[1] == again[1]


@pytest.mark.parametrize("case", FAILING, ids=named)
def test_what_an_engine_cannot_do_is_said_before_the_first_update(case, ranks):
    for said in ranks[0][2, repr(case)]:
        assert case["fails"] in said


@pytest.mark.parametrize("case", STARTING, ids=named)
def test_rank_0_alone_reads_the_model_and_the_others_never_have_all_of_it(case, ranks):
    ((first, whole, kept),), ((second, read, sent),) = ranks[0][2, repr(case)]
    assert first > whole > 0
    assert read == 0
    assert whole / 2 < second < 0.7 * whole, "its half, and one weight at a time"
    assert kept == sent == 7


def test_a_checkpoint_of_fsdp2_goes_on_with_another_number_of_ranks(alone, ranks, tmp_path):
    results, left = ranks
    expected = alone(MOVED)[0]
    shutil.copytree(left, tmp_path / "moved")
    for weights in (results[4, repr(MOVED)][0][0][0], alone(MOVED, tmp_path / "moved")[0]):
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-11)
