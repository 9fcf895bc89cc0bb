"""The head over ranks: divided by its vocabulary it equals the whole one; a sharded weight is gathered once (L5)."""

import pytest
import torch

from shapo_kernels.ops import linear_tiles
from tests.support.ranks import run_ranks

OPTIONS = ({}, {"softcap": 2.0, "scale": 0.7})
# What a rank's tile may take, and where the vocabulary is cut: each rank by itself would cut the tokens differently.
UNEVEN = (([48, 2400], None), ([2400, 48], 3), (96, 10), (48, 11), (None, 0))
CASES = [
    *(
        {"name": "vocabulary parallel", "arguments": [chunk_bytes, options]}
        for chunk_bytes in (None, 240, 48)
        for options in OPTIONS
    ),
    # Tokens are finished together, so that one rank would wait for the other for ever.
    *({"name": "vocabulary parallel", "arguments": [chunk_bytes, OPTIONS[1], split]} for chunk_bytes, split in UNEVEN),
    *({"name": "by pairs", "arguments": [chunk_bytes, OPTIONS[1]]} for chunk_bytes in (None, 240, 48)),
    {"name": "compiled"},
    {"name": "masked"},
    {"name": "refused"},
    {"name": "fsdp2"},
]


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    """The ranks compare; what differs is in the error that one of them ends with."""
    assert run_ranks(tmp_path, 2, CASES, "rank_linear_logps.py") == [(True, True)] * len(CASES)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_that_each_cut_the_tokens_by_themselves_would_hang(tmp_path):
    """What the common cut is for: without it a rank waits, here for five seconds, or meets another collective."""
    alone = [{"name": "cut by each rank alone", "arguments": list(UNEVEN[0])}]
    with pytest.raises(AssertionError, match=r"collective mismatch|Timed out|Connection closed"):
        run_ranks(tmp_path, 2, alone, "rank_linear_logps.py")


@pytest.mark.parametrize(("chunk_bytes", "split"), UNEVEN[:4])
def test_a_cut_of_ones_own_differs_where_the_common_one_does_not(chunk_bytes, split, monkeypatch):
    monkeypatch.setattr(linear_tiles, "FEWEST_COLUMNS", 3)
    rows = (7, 4) if split is None else (split, 11 - split)
    room = [chunk_bytes] * 2 if isinstance(chunk_bytes, int) else chunk_bytes
    options = [
        linear_tiles.HeadOptions(-100, 1, torch.float64, 1.0, None, room_of_rank, None, False, False)
        for room_of_rank in room
    ]
    weights = [torch.zeros(count, 6, dtype=torch.float64) for count in rows]
    least = min(linear_tiles.limit(*both) for both in zip(weights, options, strict=True))
    common = {"widest": max(rows), "room": least}

    def parts_of_tokens(**known):
        cuts = [linear_tiles.cut(12, *both, keeps=True, **known) for both in zip(weights, options, strict=True)]
        return {tuple((part.start, part.stop) for part in cut.token_parts()) for cut in cuts}

    assert len(parts_of_tokens()) == 2
    assert len(parts_of_tokens(**common)) == 1
