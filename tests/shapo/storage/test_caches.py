"""A cache is used by what it was made from, and only while it is whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from shapo.storage.caches import header_of, load_cached, save_cached

KEY = {"model": "1", "data": "2"}
NUMBERS = {"chosen": torch.arange(4.0), "rejected": torch.zeros(4)}


@pytest.fixture
def path(tmp_path):
    save_cached(tmp_path / "cache", KEY, NUMBERS)
    return tmp_path / "cache"


def load(path, key=KEY, length=4):
    return load_cached(path, key, ("chosen", "rejected"), length)


def test_what_was_saved_comes_back_by_its_key_alone(path, tmp_path):
    found = load(path)
    assert found is not None
    assert all(torch.equal(found[name], value) for name, value in NUMBERS.items())
    assert load(path, {**KEY, "data": "3"}) is None
    assert load(path, length=5) is None
    assert load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("place", [-1, -9, -20])
def test_a_flipped_bit_is_seen(place, path):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    assert load(path) is None


def test_other_tensors_are_not_taken_for_the_wanted_ones(path):
    tensors = load_file(path)
    save_file({"chosen": tensors["chosen"]}, path, metadata=header_of(path))
    assert load(path) is None
    path.write_text("not this")
    assert load(path) is None
    assert header_of(path) == {}
