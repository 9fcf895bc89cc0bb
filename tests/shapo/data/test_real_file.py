"""The loaders on a real file of hh-rlhf, where there is one; only counts are looked at, never texts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from shapo.data.formats import load_pairs
from shapo.data.pairs import ASSISTANT_MARKER
from shapo.data.tokens import PairEncoder
from shapo.probe import probe_examples

REPOSITORY = Path(__file__).parents[3]
FILE = Path(os.environ.get("SHAPO_HH_FILE", REPOSITORY.parent / "shared/data/hh-rlhf/harmless-base.jsonl.gz"))

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is absent; SHAPO_HH_FILE names another place")


def test_every_row_is_a_pair_or_counted() -> None:
    with gzip.open(FILE, "rt", encoding="utf-8") as text:
        rows = [json.loads(line) for line in text]
    found = load_pairs(FILE)
    assert found.format == "hh"
    assert len(found) + sum(found.dropped.values()) == len(rows)
    assert sum(found.dropped.values()) < 0.02 * len(rows)
    whole = {(row["chosen"], row["rejected"]) for row in rows}
    assert all((pair.prompt + pair.chosen, pair.prompt + pair.rejected) in whole for pair in found)
    assert all(pair.prompt.endswith(ASSISTANT_MARKER) for pair in found)
    assert all(ASSISTANT_MARKER not in pair.chosen + pair.rejected for pair in found)
    assert len(probe_examples(found)) == 2 * len(found)


def test_its_long_dialogues_fit_the_budget(tiny_encoder: PairEncoder) -> None:
    marker = tiny_encoder.encode_prompt(ASSISTANT_MARKER)[1:]
    for pair in load_pairs(FILE, limit=200):
        chosen, rejected = tiny_encoder.encode_pair(pair.prompt, pair.chosen, pair.rejected)
        assert max(len(chosen), len(rejected)) <= tiny_encoder.max_length
        prompt = chosen.input_ids[: chosen.prompt_length]
        assert prompt == rejected.input_ids[: rejected.prompt_length]
        assert prompt[-len(marker) :] == marker
