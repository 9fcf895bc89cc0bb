"""S12: two ranks equal one process; a peer's norm is its rank's own, or its update no longer runs.

Every engine, uneven shards, per-rank perturbation and refusals: `tests/distributed/`.
"""

import pytest
import torch

from tests.requirements.registry import RANKS
from tests.support.engines import build
from tests.support.rank_requirements import named, trained
from tests.support.ranks import run_ranks

CASES = [
    {"wrapper": wrapper, "engine": engine, "width": 7}
    for engine, of in RANKS.items()
    for wrapper in (*of["met_by"], *of["missed_by"])
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), 2, CASES, "rank_requirements.py")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"S12-{c['engine']}-{c['wrapper']}" for c in CASES])
def test_two_ranks_equal_one_process_but_for_those_who_miss_it(results, number):
    case = CASES[number]
    expected = trained(named(case["wrapper"]), build(case["width"]))

    def check():
        for result in results[number]:
            assert not isinstance(result, str), result
            for name, parameter in expected.items():
                torch.testing.assert_close(result[name], parameter, rtol=1e-6, atol=1e-9)

    if case["wrapper"] in RANKS[case["engine"]]["met_by"]:
        check()
    else:
        with pytest.raises(AssertionError):
            check()
