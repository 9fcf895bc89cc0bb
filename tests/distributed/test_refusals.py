"""What cannot be done with sharded weights is refused in one line, when the optimizer is made or at its first use."""

import re

import pytest

from tests.support.ranks import run_ranks

SHARDED = "SubspaceError: the selected weights are sharded: use ascent='selective' with perturbation='delta' or 'auto'"
STATIC = r"RuntimeError: DistributedDataParallel\(static_graph=True\) .* use static_graph=False, or `with opt.ascent"
CASES = [
    ({"engine": "fully_shard", "options": {"perturbation": "in_place"}}, SHARDED),
    ({"engine": "fully_shard", "options": {"ascent": "grad"}}, SHARDED),
    (
        {"engine": "fully_shard", "by_hand": True},
        "RuntimeError: the selected weights are sharded: use `with",
    ),
    ({"engine": "fsdp1_orig", "options": {"perturbation": "in_place"}}, SHARDED),
    ({"engine": "fsdp1_flat"}, "SubspaceError: the model cannot be perturbed: .* pass use_orig_params=True"),
    ({"engine": "fsdp1_no_shard"}, "SubspaceError: the model cannot be perturbed: .* use DistributedDataParallel"),
    ({"engine": "fsdp1_inner"}, "UnsupportedLayout: the model is inside a FullyShardedDataParallel .* around that one"),
    ({"engine": "partial"}, r"SubspaceError: 'down.weight' cannot be perturbed: it is sharded as \(Partial"),
    ({"engine": "half_of_the_ranks"}, "SubspaceError: 'down.weight' cannot be perturbed: .* has 1 of 2 ranks"),
    ({"engine": "half_of_the_ranks", "options": {"sync": False}}, "nothing"),
    # A plain weight of such a model is trained by the same ranks.
    ({"engine": "half_of_the_ranks", "names": ["head.weight"]}, "SubspaceError: 'head.weight' .* has 1 of 2 ranks"),
    ({"engine": "ddp_static", "options": {"ascent": "grad"}}, STATIC),
    ({"engine": "ddp_static", "closure": True}, STATIC),
    ({"engine": "ddp_of_tensor_parallel"}, "SubspaceError: 'down.weight' cannot be perturbed: .* use fully_shard"),
    ({"engine": "forward_replaced"}, "RuntimeError: .* took or gave a plain tensor.* ascent='grad'"),
    ({"engine": "forward_replaced", "options": {"ascent": "grad", "perturbation": "in_place"}}, "nothing"),
]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), 2, [case for case, _ in CASES], "rank_refusals.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{case['engine']}-{i}" for i, (case, _) in enumerate(CASES)]
)
def test_it_is_refused_in_one_line(complaints, number):
    for complaint in complaints[number]:
        assert "\n" not in complaint
        assert re.match(CASES[number][1], complaint), complaint
