"""Plots: what is drawn of which numbers."""

import re

import pytest

from shapo.plots import COLORS, plot_differences

PANELS = {
    "in domain": {"a - b": (-0.2, -0.3, -0.1), "a - c": (0.1, -0.1, 0.3), "a - d": (0.2, 0.1, 0.3)},
    "under attack": {"a - b": (0.2, 0.1, 0.3), "a - c": (0.0, -0.1, 0.1), "a - d": (0.1, -0.1, 0.3)},
}


@pytest.fixture
def drawn(tmp_path):
    path = tmp_path / "differences.svg"
    plot_differences(path, PANELS, label="difference", title="two tests")
    return path.read_text()


def test_a_difference_is_coloured_by_its_sign_where_its_interval_leaves_out_zero(drawn):
    lines = [found.lower() for found in re.findall(r"stroke: (#\w{6}); stroke-width: 1\.6", drawn)]
    better, worse = COLORS[0].lower(), COLORS[1].lower()
    assert [lines.count(color) for color in (better, worse)] == [1, 2]
    assert len(lines) == 6


def test_every_comparison_and_panel_is_named_once(drawn):
    for name in (*PANELS, *PANELS["in domain"]):
        assert len(re.findall(f">{name}<", drawn)) == 1


def test_the_same_numbers_give_the_same_file(drawn, tmp_path):
    plot_differences(tmp_path / "again.svg", PANELS, label="difference", title="two tests")
    assert (tmp_path / "again.svg").read_text() == drawn
