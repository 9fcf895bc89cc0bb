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
    # Ranks that would cut the tokens differently, by their rows or their memory, and one without a vocabulary: tokens
    # are finished together, so that one rank would wait for the other for ever.
    *(
        {"name": "vocabulary parallel", "arguments": [chunk_bytes, OPTIONS[1], split]}
        for chunk_bytes, split in (([48, 2400], None), ([2400, 48], 3), (96, 10), (48, 11), (None, 0))
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
