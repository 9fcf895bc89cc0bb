"""Recorded rows: what is added to what, and how tables are made of them."""

import json

from benchmarks import report, rows


def record(case, milliseconds):
    return rows.row("suite", case, report.OURS, [milliseconds / 1e3] * 3, times_ours=1.0)


def test_rows_of_one_case_are_added_to_those_of_others_from_the_same_machine_alone(tmp_path):
    path = rows.add("suite", [record("one", 1.0)], tmp_path)
    rows.add("suite", [record("two", 2.0)], tmp_path)
    rows.add("suite", [record("one", 3.0)], tmp_path)
    recorded = json.loads(path.read_text())
    assert [(row["case"], round(row["p50_ms"])) for row in recorded["rows"]] == [("one", 3), ("two", 2)]
    table = report.render_wide("suite", recorded["rows"], recorded["environment"])
    assert "| two | 2.0 (2.0 to 2.0) |" in table
    path.write_text(json.dumps(recorded | {"environment": recorded["environment"] | {"cpu": "another"}}))
    rows.add("suite", [record("three", 1.0)], tmp_path)
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["three"]


def test_another_day_or_commit_of_the_same_machine_is_added_to(tmp_path):
    path = rows.add("suite", [record("one", 1.0)], tmp_path)
    recorded = json.loads(path.read_text())
    changed = recorded["environment"] | {"date": "2020-01-01", "commit": "1234567"}
    path.write_text(json.dumps(recorded | {"environment": changed}))
    rows.add("suite", [record("two", 1.0)], tmp_path)
    found = json.loads(path.read_text())
    assert [(row["case"], row.get("commit"), row.get("date")) for row in found["rows"]] == [
        ("one", "1234567", "2020-01-01"),
        ("two", None, None),
    ]
    table = report.render("suite", found["rows"], found["environment"])
    assert f"commit 1234567, {found['environment']['commit']}, 2020-01-01, {found['environment']['date']};" in table


def test_updates_of_several_cases_are_a_line_each_in_plain_ones():
    def update(case, variant, ratio, megabytes):
        times = {"p20_ms": 90.0, "p50_ms": 100.0 * ratio, "p80_ms": 110.0}
        return {"case": case, "variant": variant, "rounds": 5, "ratio_to_plain": ratio, **times} | {
            "extra_bytes": megabytes * 1_000_000
        }

    rows = [update("half", "plain", 1.0, 7), update("half", "ours", 1.33, 8), update("last", "plain", 1.0, 7)]
    machine = {"cpu": "x", "threads": 1, "cores": 1, "gpu": None, "torch": "2", "commit": "c"}
    table = report.render_wide("suite", rows, machine).splitlines()
    assert "| half | 100 (90 to 110) | 1.33 | 7; 8 |" in table
    assert "| last | 100 (90 to 110) |  | 7; none |" in table
