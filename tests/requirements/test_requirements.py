"""S1 to S18, each by a check that ours meets and that catches the peers who miss it."""

from pathlib import Path

import pytest

from tests.requirements import (
    device,  # noqa: F401
    protocol,  # noqa: F401
    registry,
    weights,  # noqa: F401
)
from tests.requirements.wrappers import Ours


def peers(attribute):
    """Requirements with each of the peers that it names."""
    return pytest.mark.parametrize(
        ("requirement", "peer"),
        [(requirement, peer) for requirement in registry.ALL for peer in getattr(requirement, attribute)],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )


@pytest.mark.parametrize("requirement", registry.ALL, ids=str)
def test_it_is_met(requirement):
    requirement.check(Ours)


@peers("missed_by")
def test_the_check_catches(requirement, peer):
    with pytest.raises(requirement.missed_by[peer]):
        requirement.check(peer)


@peers("met_by")
def test_a_peer_meets_it_too(requirement, peer):
    requirement.check(peer)


def test_every_requirement_has_a_check_that_some_peer_misses():
    numbers = {r.number for r in registry.ALL if r.missed_by} | {"S12"}
    assert numbers == {f"S{number}" for number in range(1, 19)}


def test_the_documented_table_is_that_of_the_checks():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "requirements.md").read_text()
    assert registry.table() in page, f"docs/requirements.md needs this table:\n{registry.table()}"
    for files in registry.MORE.values():
        for file in files.replace("(", ",").split(", "):
            assert not file.endswith(".py") or (root / "tests" / file.strip()).exists(), file
