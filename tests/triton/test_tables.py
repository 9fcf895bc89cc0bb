"""The memory that is set aside for captured tables, without a GPU: ordinary memory stands in for page-locked."""

import pytest
import torch

pytest.importorskip("triton")

from shapo_kernels.triton import tables

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def ordinary_memory(monkeypatch):
    monkeypatch.setattr(tables, "_pinned", lambda words: torch.empty(words, dtype=torch.int64))
    for name, value in (("_arena", None), ("_arena_used", 0), ("_captured_words", [])):
        monkeypatch.setattr(tables, name, value)


@pytest.mark.parametrize("layers", [1, 224, 60_000])
def test_a_capture_has_room_for_thirty_tables_as_large_as_those_of_the_call_before(layers):
    words = tables._words(layers)
    for _ in range(3):  # captures one after the other, each with its eager call before
        tables._set_memory_aside(words)
        parts = [tables._host_words(words, CUDA, capturing=True) for _ in range(30)]
        assert len({part.data_ptr() for part in parts}) == 30
        assert all(len(part) == words for part in parts)
    for number, part in enumerate(tables._captured_words):
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(tables._captured_words))


def test_a_capture_without_a_call_before_says_what_to_do():
    with pytest.raises(RuntimeError, match="run them once outside of a capture"):
        tables._host_words(14, CUDA, capturing=True)
