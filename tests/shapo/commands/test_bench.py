"""`shapo bench` measures every contender and checks it."""

from __future__ import annotations

import json


def test_the_benchmark_checks_every_contender_and_writes_ratios(shapo, tmp_path):
    code, out, _ = shapo(
        "bench",
        "--layers",
        2,
        "--hidden",
        16,
        "--intermediate",
        32,
        "--percent",
        10,
        "--repeats",
        2,
        "--device",
        "cpu",
        "--quiet",
    )
    assert code == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["operators"]) == {"subspace update", "column cosine"}
    for rows in result["operators"].values():
        assert {row["name"] for row in rows if not row["eager"]} >= {"shapo, reference"}
        assert all(row["median_ms"] > 0 and row["repeats"] == 2 for row in rows)
    assert "speed against the best eager" in out
