"""The tables of docs/evidence.md are those of the recorded rows.

python tests/test_evidence.py     # writes the tables anew
"""

import json
import re
import sys
from pathlib import Path

from shapo.study.plan import Plan
from shapo.study.queue import read_rows
from shapo.study.report import figure_table, render_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
STUDY = ROOT / "benchmarks" / "results" / "study"
MARKERS = "<!-- study -->\n", "<!-- /study -->"


def tables():
    plan = Plan.from_dict(json.loads((STUDY / "settings.json").read_text())["plan"])
    return render_tables(plan, read_rows(STUDY), "####")


def test_the_tables_are_those_of_the_recorded_rows():
    page = PAGE.read_text()
    begin, end = (page.index(marker) for marker in MARKERS)
    assert page[begin + len(MARKERS[0]) : end].strip() == tables().strip(), "run `python tests/test_evidence.py`"


def test_rows_hold_numbers_and_names_but_no_texts():
    for path in STUDY.rglob("*.json"):
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text())
        assert [text for text in strings if len(text.split()) > 8 or "/" in text] == [], path


def test_shares_of_the_rise_are_ratios_of_means():
    rows = read_rows(STUDY)
    for entry in figure_table(rows, "figure1"):
        if "of_all" in entry:
            number = [p["rho"] for p in rows["figure1-all"]["points"]].index(entry["rho"])
            own = rows[f"figure1-{entry['space']}"]["points"][number]["rise"]
            whole = rows["figure1-all"]["points"][number]["rise"]
            assert abs(entry["of_all"][0] - sum(own) / sum(whole)) < 1e-9
            assert entry["of_all"][1] <= entry["of_all"][0] <= entry["of_all"][2]


if __name__ == "__main__":
    page = PAGE.read_text()
    begin, end = (page.index(marker) for marker in MARKERS)
    PAGE.write_text(page[: begin + len(MARKERS[0])] + tables() + "\n" + page[end:])
    sys.exit(0)
