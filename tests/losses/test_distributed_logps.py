"""The head over ranks: divided by its vocabulary it equals the whole one; a sharded weight is gathered once (L5)."""

import pytest

from tests.support.ranks import run_ranks

OPTIONS = ({}, {"softcap": 2.0, "scale": 0.7})
CASES = [
    *(
        {"name": "vocabulary parallel", "arguments": [chunk_bytes, options]}
        for chunk_bytes in (None, 240, 48)
        for options in OPTIONS
    ),
    {"name": "compiled"},
    {"name": "masked"},
    {"name": "refused"},
    {"name": "fsdp2"},
]


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    """The ranks compare; what differs is in the error that one of them ends with."""
    assert run_ranks(tmp_path, 2, CASES, "rank_linear_logps.py") == [(True, True)] * len(CASES)
