"""Small tiles of the head."""

from __future__ import annotations

import pytest

from shapo_kernels.ops import linear_tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of few columns, so that a small vocabulary is cut as a large one is."""
    monkeypatch.setattr(linear_tiles, "FEWEST_COLUMNS", 3)
