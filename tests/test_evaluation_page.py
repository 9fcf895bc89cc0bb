"""The measured parts of docs/evaluation.md are those of the recorded rows.

python tests/test_evaluation_page.py     # writes them anew
"""

import json
import textwrap
from pathlib import Path

import pytest

from benchmarks import answers, attacks
from benchmarks.rows import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"


def recorded(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def parts():
    """The text between `<!-- NAME -->` and `<!-- /NAME -->`, by name."""
    said = textwrap.fill(answers.sentence(recorded("answers")["rows"]), 140)
    return {
        "answers": textwrap.indent(f"{said}\nMade by `python -m benchmarks.answers`.", "  "),
        "attacks": attacks.tables(recorded("attacks")["rows"]),
    }


def places(page, name):
    opened, closed = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    begin = page.index(opened) + len(opened)
    return begin, page.rindex("\n", 0, page.index(closed)) + 1


@pytest.mark.parametrize("name", parts())
def test_what_the_page_says_is_what_was_recorded(name):
    page = PAGE.read_text()
    begin, end = places(page, name)
    assert page[begin:end].rstrip("\n") == parts()[name], "run `python tests/test_evaluation_page.py`"


def test_recorded_attacks_hold_no_texts():
    for row in recorded("attacks")["rows"]:
        assert not [value for value in row.values() if isinstance(value, str) and len(value.split()) > 3]


def test_a_batch_gives_four_times_as_many_answers_a_minute_and_the_same_ones():
    batch, _ = recorded("answers")["rows"]
    assert batch["times_single"] >= 4
    assert batch["same"] == batch["prompts"]


if __name__ == "__main__":
    for name, text in parts().items():
        page = PAGE.read_text()
        begin, end = places(page, name)
        PAGE.write_text(page[:begin] + text + "\n" + page[end:])
