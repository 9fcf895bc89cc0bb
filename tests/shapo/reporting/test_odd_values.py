"""Results with a value that no command has written: the page leaves them out or shows them, and keeps the others."""

from __future__ import annotations

import json
import random

import pytest

from shapo.reporting.collect import collect
from shapo.reporting.page import render
from tests.support import runs

ODD = [
    None,
    "x",
    [],
    {},
    [1],
    {"value": 1},
    float("nan"),
    float("inf"),
    1e308,
    -1e308,
    10**400,
    True,
    -1,
    "\ud800",
    "<b>",
]
MADE = {
    "run.json": lambda folder: runs.train_run(folder, seed=1, rho=0.3),
    "metrics.jsonl": lambda folder: runs.train_run(folder, seed=1),
    "attack.json": runs.attack,
    "sharpness.json": runs.sharpness,
    "report.json": runs.study,
    "": lambda folder: runs.safety(folder.with_suffix(".json")),
}


def places(value):
    """Every (container, key) inside a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from places(inner)


def changed(text, chance):
    """One line of JSON with an entry removed or replaced."""
    value = json.loads(text)
    container, key = chance.choice(list(places(value)))
    if isinstance(container, dict) and chance.random() < 0.2:
        del container[key]
    else:
        container[key] = chance.choice(ODD)
    return json.dumps(value)


@pytest.mark.parametrize("name", MADE)
def test_an_odd_value_spoils_no_page(name, tmp_path):
    chance = random.Random(name)
    whole, odd = runs.train_run(tmp_path / "whole"), MADE[name](tmp_path / "odd")
    file = odd / name if name else odd
    lines = file.read_text().splitlines()
    for _ in range(40):
        number = chance.randrange(len(lines))
        mutated = [changed(line, chance) if n == number else line for n, line in enumerate(lines)]
        file.write_text("\n".join(mutated) + "\n")
        page = collect([whole, odd])
        assert any(section.title.startswith("Training") for section in page.sections)
        html = render(page)
        html.encode()
        assert "<b>" not in html
