"""The tables and the plot of docs/evidence.md are those of the recorded rows.

python tests/test_evidence.py     # writes them anew
"""

import functools
import json
import re
import sys
from pathlib import Path

import pytest

from shapo.study.methods import comparison_table
from shapo.study.plan import PLAIN_CHATML, Plan
from shapo.study.queue import read_rows
from shapo.study.report import figure_table, plot_comparisons, plot_labels, plot_shares, render_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
PLOT = ROOT / "docs" / "comparisons.svg"
SHARES = ROOT / "docs" / "shares.svg"
LABELS = ROOT / "docs" / "soft_labels.svg"
RESULTS = ROOT / "benchmarks" / "results"
STUDY, SMALL = RESULTS / "study", RESULTS / "study-cpu"
FOLDERS = {"study": STUDY, "study-cpu": SMALL}


def plan(folder):
    return Plan.from_dict(json.loads((folder / "settings.json").read_text())["plan"])


@functools.cache
def tables(folder):
    # What is known of the initial model stands in the first study's tables.
    return render_tables(plan(folder), read_rows(folder), "####", figure=folder == STUDY)


def between(page, name):
    """Where the tables of a study begin and end."""
    begin = f"<!-- {name} -->\n"
    return page.index(begin) + len(begin), page.index(f"<!-- /{name} -->")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_tables_are_those_of_the_recorded_rows(name):
    page = PAGE.read_text()
    begin, end = between(page, name)
    assert page[begin:end].strip() == tables(FOLDERS[name]).strip(), "run `python tests/test_evidence.py`"


def test_every_difference_in_the_answer_stands_in_the_tables():
    answer = PAGE.read_text().split("### Questions 2 to 4")[1].split("### What this does not show")[0]
    quoted = set(re.findall(r"[+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", answer))
    assert len(quoted) > 60
    assert quoted <= set(re.findall(r"[+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", tables(SMALL)))


def test_the_radii_at_matched_loss_increase_are_the_recorded_ones_in_both_units():
    paragraph = PAGE.read_text().split("*At matched loss increase*")[1].split("\n\n")[0]
    absolute, relative = paragraph.split("As multiples")
    radii = re.findall(r"\b0\.\d+ in", absolute)
    norms = re.search(r"which is (\d+), (\d+) and (\d+)", relative).groups()
    ratios = re.search(r"they are ([\d.e-]+), ([\d.e-]+) and ([\d.e-]+):", relative).groups()
    for space, radius, norm, ratio in zip(("all", "gradient-1", "random-1-0"), radii, norms, ratios, strict=True):
        row = json.loads((STUDY / "rows" / f"match-0.2-{space}.json").read_text())
        figure = json.loads((STUDY / "rows" / f"figure1-{space}.json").read_text())
        assert float(radius.split()[0]) == float(f"{row['rho']:.2g}")
        assert float(ratio) == float(f"{row['ratio']:.3g}")
        assert int(norm) == round(figure["weight_norm"])


def test_every_interval_in_the_answer_is_one_of_the_tables_rounded():
    answer = PAGE.read_text().split("## The answer")[1].split("### Tables")[0]
    known = [
        (float(low), float(high))
        for folder in FOLDERS.values()
        for low, high in re.findall(r"\(([+-]?[\d.]+) to ([+-]?[\d.]+)(?: %)?\)", tables(folder))
    ]
    quoted = re.findall(r"\(([+-]?[\d.]+) to ([+-]?[\d.]+)[,)]", answer)
    assert len(quoted) > 100
    for low, high in quoted:
        rounding = 0.501 * 10 ** -len(low.partition(".")[2])
        near = [a for a, b in known if abs(a - float(low)) <= rounding and abs(b - float(high)) <= rounding]
        assert near, f"({low} to {high}) is in no table"


def test_the_plot_names_every_comparison_with_plain_dpo_or_a_control():
    plot = PLOT.read_text()
    table = comparison_table(read_rows(SMALL), plan(SMALL).beta)
    controls = ("shapo-all", "shapo-like")
    compared = {
        f"{e['method']} - {e['baseline']}, {len(e['seeds'])} seeds, {100 * e['noise']:g} % flipped"
        for e in table
        if not e["method"].endswith("-reward") and (e["baseline"] == "dpo" or e["baseline"].startswith(controls))
    }
    assert {name.split(",")[0] for name in compared} >= {"rdpo - dpo", "shapo-probe-1-wide - shapo-like-probe-1-wide"}
    assert compared == set(re.findall(r">(\S+ - \S+, [^<]+)<", plot)), "run `python tests/test_evidence.py`"


def test_the_plot_of_shares_names_every_subspace_of_figure_1():
    spaces = {name.removeprefix("figure1-") for name in read_rows(STUDY) if name.startswith("figure1-")}
    assert set(re.findall(r">(\S+) \(\d+\)<", SHARES.read_text())) == spaces - {"all"}


def test_the_plot_of_soft_labels_has_a_histogram_for_each_beta():
    row = read_rows(SMALL)["reward"]
    assert re.findall(r">beta_r ([\d.]+)<", LABELS.read_text()) == list(row["histograms"])
    for beta, counts in row["histograms"].items():
        # Within 0.01 of an end is a part of the last twentieth.
        assert row["saturated"][beta] * sum(counts) <= counts[0] + counts[-1]


def strings_of(value):
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings_of(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings_of(part)]
    return [value] if isinstance(value, str) else []


def test_rows_hold_numbers_and_names_but_no_texts():
    for path in [path for folder in FOLDERS.values() for path in folder.rglob("*.json")]:
        strings = [text for text in strings_of(json.loads(path.read_text())) if text != PLAIN_CHATML]
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
    text = PAGE.read_text()
    for key, path in FOLDERS.items():
        first, last = between(text, key)
        text = f"{text[:first]}{tables(path)}\n{text[last:]}"
    PAGE.write_text(text)
    plot_shares(SHARES, read_rows(STUDY))
    plot_labels(LABELS, read_rows(SMALL))
    plot_comparisons(PLOT, comparison_table(read_rows(SMALL), plan(SMALL).beta))
    sys.exit(0)
