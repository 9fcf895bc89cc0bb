"""What a page shows: methods with their seeds, runs of different data apart, and what is left out with the reason."""

from __future__ import annotations

import json
import re

import pytest

from shapo.cli import main
from shapo.errors import UserError
from shapo.reporting.collect import collect
from shapo.reporting.contents import Chart, Point, Series, over_seeds
from shapo.reporting.page import render
from shapo.reporting.svg import drawing, ticks
from tests.support import runs


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_seeds_of_a_method_are_brought_together(tmp_path):
    paths = [runs.train_run(tmp_path / f"dpo-{s}", seed=s, accuracy=(0.5, 0.75 + s / 8)) for s in (0, 1)]
    shapo = {"rho": 0.3, "relative_rho": True, "subspace": "a/critical.safetensors"}
    paths.append(runs.train_run(tmp_path / "shapo", **shapo))
    (section,) = collect(paths).sections
    rows = {row[0]: row[1:] for row in texts(section.tables[0])}
    assert rows["dpo"][:2] == ["2", "81.2 (seeds 75.0 to 87.5)"]
    assert rows["dpo + ShaPO, critical, rho 0.3 ‖W_S‖"][:2] == ["1", "75.0 (65 to 85)"]
    accuracy = next(chart for chart in section.charts if "accuracy" in chart.title)
    assert accuracy.series[0].points == (Point(0, 0.5, 0.5, 0.5), Point(10, 0.8125, 0.75, 0.875))
    assert "Some methods were run with one seed only." in section.limits


def test_a_run_repeated_with_the_same_seed_is_no_second_seed(tmp_path):
    first, again = (runs.train_run(tmp_path / name, seed=3) for name in ("first", "again"))
    page = collect([first, again])
    assert texts(page.sections[0].tables[0])[0][1:3] == ["1", "75.0 (65 to 85)"]
    assert page.left_out == [(str(again), f"the same settings and seed as {first}")]


def test_settings_that_differ_make_methods_of_their_own(tmp_path):
    paths = [runs.train_run(tmp_path / f"r{lr}", lr=lr) for lr in (1e-3, 1e-4)]
    (section,) = collect(paths).sections
    assert [row[0] for row in texts(section.tables[0])] == ["dpo (lr 0.001)", "dpo (lr 0.0001)"]


def test_sources_and_settings_left_open_are_written_as_words(tmp_path):
    given = {"data": ["a/pairs.jsonl", "b.jsonl"]}
    paths = [runs.train_run(tmp_path / f"{n}", **given, updates=n, lora=f"r={n}" if n else n) for n in (None, 4)]
    (section,) = collect(paths).sections
    assert "trained on a/pairs.jsonl, b.jsonl with" in section.text[0]
    names = [row[0] for row in texts(section.tables[0])]
    assert names == ["dpo (lora none, updates default)", "dpo (lora r=4, updates 4)"]


@pytest.mark.parametrize(
    ("other", "titles"),
    [
        ({"data": "b.jsonl"}, ["train.jsonl", "b.jsonl"]),
        ({"eval_data": "b.jsonl"}, ["measured on test.jsonl", "measured on b.jsonl"]),
        ({"model": "b"}, ["from start", "from b"]),
        ({"noise": 0.1}, ["30 % flipped", "10 % flipped"]),
        ({"split": "hard"}, ["split default", "split hard"]),
        ({"eval_split": "hard"}, ["eval split default", "eval split hard"]),
        ({"limit": 8}, ["limit default", "limit 8"]),
        ({"format": "hh"}, ["format default", "format hh"]),
        ({"preference": "better"}, ["preference default", "preference better"]),
    ],
)
def test_runs_of_different_data_are_said_to_be_and_shown_apart(other, titles, tmp_path):
    page = collect([runs.train_run(tmp_path / "a"), runs.train_run(tmp_path / "b", **other)])
    assert [section.title for section in page.sections] == [f"Training: {title}" for title in titles]
    assert "different data" in page.sections[0].text[0]
    assert all(len(section.tables[0].rows) == 1 for section in page.sections)


def test_data_that_changed_under_the_same_name_are_other_data(tmp_path):
    paths = [runs.train_run(tmp_path / name, noise=0) for name in "ab"]
    for path, digest in zip(paths, "12", strict=True):
        values = json.loads((path / "run.json").read_text())
        runs.write(path / "run.json", values | {"digests": {"data": digest, "model": "m", "evaluation": "e"}})
    assert [section.title for section in collect(paths).sections] == ["Training, set 1", "Training, set 2"]


def test_an_unfinished_run_is_drawn_as_far_as_it_goes_and_marked(tmp_path):
    whole = [runs.train_run(tmp_path / f"whole-{s}", seed=s) for s in (0, 1)]
    half = runs.train_run(tmp_path / "half", seed=2, accuracy=(0.5, 0.625))
    (half / "run.json").unlink()
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"kind": "update", "update": 7}\n{"kind": "upd')  # a kill has cut the last line
    page = collect([half, *whole])
    (section,) = page.sections
    assert [(row[0], row[1]) for row in texts(section.tables[0])] == [("dpo", "2")]
    finished, unfinished = section.charts[0].series
    assert (finished.name, finished.dotted) == ("dpo", False)
    assert (unfinished.name, unfinished.dotted) == ("dpo, not finished", True)
    assert unfinished.points == (Point(0, 0.5), Point(10, 0.625))
    assert f"{half} (7 of 10 updates)" in section.text[-1]
    assert page.left_out == []
    assert 'class="c1 dotted"' in render(page)


def test_a_page_of_unfinished_runs_alone_has_curves_and_no_table(tmp_path):
    half = runs.train_run(tmp_path / "half")
    (half / "run.json").unlink()
    (section,) = collect([half]).sections
    assert (section.tables, len(section.charts)) == ([], 3)
    assert "Not finished" in render(collect([half]))


def test_without_held_out_pairs_the_loss_of_the_batches_is_drawn(tmp_path):
    path = runs.train_run(tmp_path / "a", accuracy=())
    losses = [1 / n for n in range(1, 121)]
    rows = [{"kind": "update", "update": n, "loss": 9.0, "ascent_loss": loss} for n, loss in enumerate(losses, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = json.loads((path / "run.json").read_text())
    runs.write(path / "run.json", values | {"final": {}})
    (section,) = collect([path]).sections
    assert section.tables[0].columns == ("method", "seeds", "ms an update")
    (chart,) = section.charts
    # 120 updates are means of three; under ShaPO the loss before the perturbation.
    assert [point.x for point in chart.series[0].points] == list(range(3, 121, 3))
    assert chart.series[0].points[0].y == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_a_finished_run_goes_before_an_unfinished_one_of_the_same_settings(tmp_path):
    half, whole = (runs.train_run(tmp_path / name) for name in ("half", "whole"))
    (half / "run.json").unlink()
    page = collect([half, whole])
    assert [row[1] for row in texts(page.sections[0].tables[0])] == ["1"]
    assert page.left_out == [(str(half), f"the same settings and seed as {whole}")]


def test_attacks_on_the_same_prompts_share_their_curves(tmp_path):
    paths = [runs.attack(tmp_path / "a"), runs.attack(tmp_path / "b", unsafe=(0.0, 0.5))]
    paths.append(runs.attack(tmp_path / "c", data="other"))
    first, second = collect(paths).sections
    assert (first.title, second.title) == ("Harmful fine-tuning, set 1", "Harmful fine-tuning, set 2")
    success = first.charts[0]
    assert [series.name for series in success.series] == ["a", "b"]
    assert success.series[0].points == (Point(0, 0.25, 0.25, 0.25), Point(5, 0.8125, 0.75, 0.875))
    assert len(second.charts[0].series) == 1


def test_attacks_judged_by_another_probe_are_shown_apart(tmp_path):
    paths = [runs.attack(tmp_path / name) for name in "ab"]
    values = json.loads((paths[1] / "attack.json").read_text())
    runs.write(paths[1] / "attack.json", values | {"judge_digest": "another"})
    assert len(collect(paths).sections) == 2


def test_over_refusal_is_shown_beside_attack_success_or_named_as_missing(tmp_path):
    path = runs.attack(tmp_path / "a")
    (section,) = collect([path]).sections
    assert any("Over-refusal was not measured" in limit for limit in section.limits)
    assert {row[5] for row in texts(section.tables[0])} == {"-"}
    values = json.loads((path / "attack.json").read_text())
    for seed in values["seeds"]:
        for point in seed["curve"]:
            point["over_refusal"] = runs.bounded(0.125)
    runs.write(path / "attack.json", values)
    (section,) = collect([path]).sections
    assert not any("Over-refusal was not measured" in limit for limit in section.limits)
    assert {row[5] for row in texts(section.tables[0])} == {"12.5 (6 to 56)"}
    assert "Over-refusal over the attack" in [chart.title for chart in section.charts]


def test_an_attack_that_stopped_between_seeds_says_how_many_it_has(tmp_path):
    path = runs.attack(tmp_path / "a")
    values = json.loads((path / "attack.json").read_text())
    values["arguments"]["seeds"] = 3
    runs.write(path / "attack.json", values)
    (section,) = collect([path, runs.attack(tmp_path / "b")]).sections
    assert "Not finished: a has 2 of 3 seeds; its lines are dotted." in section.text
    lines = {series.name: series.dotted for series in section.charts[0].series}
    assert lines == {"a, not finished": True, "b": False}


def test_an_attack_or_a_demo_without_results_is_named(tmp_path):
    whole = runs.attack(tmp_path / "whole")
    for place in ("attack/seed-0", "demo/methods"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "metrics.jsonl").write_text("")
    page = collect([whole, tmp_path / "attack", tmp_path / "demo"])
    assert len(page.sections) == 1
    reasons = dict(page.left_out)
    assert "none of its seeds has ended" in reasons[str(tmp_path / "attack")]
    assert "unfinished demo" in reasons[str(tmp_path / "demo")]


@pytest.mark.parametrize("setting", ["max_length", "chat_template", "held_out", "lr"])
def test_attacks_with_other_settings_are_shown_apart(setting, tmp_path):
    paths = [runs.attack(tmp_path / name) for name in "ab"]
    values = json.loads((paths[1] / "attack.json").read_text())
    values["arguments"][setting] = 3
    runs.write(paths[1] / "attack.json", values)
    assert len(collect(paths).sections) == 2


def test_a_study_shows_its_intervals(tmp_path):
    (section,) = collect([runs.study(tmp_path / "study")]).sections
    methods, differences = section.tables
    assert texts(methods)[1][:6] == ["shapo-gradient", "40", "2", "75.0", "75.0", "75.0"]
    assert texts(differences)[0][-1] == "-0.0200 (-0.0500 to +0.0100)"
    assert section.charts[0].series == (Series("gradient", (Point(0.1, 0.1, 0.05, 0.2), Point(1.0, 1.0, 0.5, 2.0))),)


def test_both_bounds_and_over_refusal_stand_in_one_row(tmp_path):
    (section,) = collect([runs.safety(tmp_path / "e.json")]).sections
    assert texts(section.tables[0])[0] == [
        "e", "harmbench", "wildguard", "8", "2", "25.0 to 50.0 (12 to 75)", "25.0 (12 to 62)",
    ]  # fmt: skip


def test_what_cannot_be_shown_is_named_with_its_reason(tmp_path):
    whole = runs.train_run(tmp_path / "whole")
    half = runs.train_run(tmp_path / "half")
    (half / "run.json").unlink()
    (half / "metrics.jsonl").write_text('{"kind": "update", "update": 3}\n')
    (tmp_path / "none").mkdir()
    damaged = runs.train_run(tmp_path / "damaged")
    (damaged / "run.json").write_text('{"arguments": ')
    (tmp_path / "odd.json").write_text("[1]")
    (tmp_path / "answers.json").write_text('{"answers": []}')
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "probe.json").write_text("{}")
    given = [whole, half, tmp_path / "none", damaged, tmp_path / "odd.json", tmp_path / "nowhere"]
    (tmp_path / "verdicts.jsonl").write_text('{"verdict": "safe"}\n{"verdict": "safe"}\n')
    given += [tmp_path / "answers.json", tmp_path / "probe", tmp_path / "verdicts.jsonl"]
    reasons = dict(collect(given).left_out)
    assert "counts verdicts into a JSON file" in reasons[str(tmp_path / "verdicts.jsonl")]
    assert "holds no numbers" in reasons[str(tmp_path / "answers.json")]
    assert "measures no method" in reasons[str(tmp_path / "probe")]
    assert "unfinished run" in reasons[str(half)]
    assert "no run" in reasons[str(tmp_path / "none")]
    assert "run.json is damaged" in reasons[str(damaged)]
    assert "no JSON object" in reasons[str(tmp_path / "odd.json")]
    assert "no such file" in reasons[str(tmp_path / "nowhere")]


def test_a_run_of_another_version_spoils_no_page(tmp_path):
    whole, odd = runs.sharpness(tmp_path / "whole"), runs.attack(tmp_path / "odd")
    (odd / "attack.json").write_text('{"arguments": {}, "seeds": 3}')
    page = collect([whole, odd])
    assert len(page.sections) == 1
    assert "another version" in page.left_out[0][1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "metrics.jsonl").write_text('{"kind": \n{"kind": "update", "update": 1}\n'),
        lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n\n"),
        lambda folder: runs.write(folder / "run.json", {"final": [], "arguments": {}}),
        lambda folder: runs.write(folder / "run.json", {"final": {}, "arguments": "x"}),
        lambda folder: (folder / "run.json").write_text('{"final": ' + "[" * 100_000),
        lambda folder: (folder / "run.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "run.json").rename(folder / "attack.json"),
        lambda folder: (folder / "run.json").rename(folder / "sharpness.json"),
        lambda folder: (folder / "run.json").rename(folder / "report.json"),
    ],
)
def test_an_odd_folder_takes_no_other_with_it(damage, tmp_path):
    whole, odd = (runs.train_run(tmp_path / name, seed=seed) for seed, name in enumerate(("whole", "odd")))
    damage(odd)
    page = collect([whole, odd])
    assert [row[1] for row in texts(page.sections[0].tables[0])] == ["1"]
    assert [name for name, _ in page.left_out] == [str(odd)]
    assert len(page.left_out[0][1]) < 300
    render(page)


def test_a_folder_of_runs_says_how_they_are_given(tmp_path):
    runs.train_run(tmp_path / "a")
    with pytest.raises(UserError, match=r"it holds 1 folders, which .*/\* names"):
        collect([tmp_path])


def test_nothing_to_show_is_an_error(tmp_path, capsys):
    with pytest.raises(UserError, match="nothing to report on"):
        collect([tmp_path])
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_a_page_may_replace_an_earlier_page_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result, before = runs.safety(tmp_path / "e.json"), (tmp_path / "e.json").read_bytes()
    assert main(["report", "e.json", "--output", "report.html"]) == 0
    (tmp_path / "e.json.recipe.yaml").write_text("model: a\n")
    everything = ["e.json", "e.json.recipe.yaml", "report.html"]
    assert main(["report", *everything, "--output", "report.html"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert main(["report", "e.json", "--output", str(result)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert result.read_bytes() == before


def test_the_page_is_one_file_that_fetches_and_quotes_nothing(tmp_path):
    paths = [runs.train_run(tmp_path / "<b>&run"), runs.attack(tmp_path / "a"), runs.sharpness(tmp_path / "s")]
    paths.append(runs.safety(tmp_path / "e.json"))
    output = tmp_path / "r.html"
    assert main(["report", *map(str, paths), "--output", str(output)]) == 0
    html = output.read_text()
    assert runs.SECRET not in html
    assert not re.search(r"(?:src|href)=\"(?!#)|url\(|@import|<link|<img|<iframe|fetch\(", html)
    assert "<b>" not in html
    for title in ("Training", "Harmful fine-tuning", "Figure 1", "Evaluations", "What this does not show"):
        assert title in html


def test_every_number_of_a_chart_is_in_its_table_and_its_marks():
    points = (Point(0.1, 0.25, 0.2, 0.3), Point(1.0, 0.5))
    chart = Chart("t", "rho", "y", (Series("a", points), Series("b", points[:1])), percent=True, log_x=True)
    assert texts(chart.table()) == [["0.1", "25.0% (20.0% to 30.0%)", "25.0% (20.0% to 30.0%)"], ["1", "50.0%", ""]]
    marks = [mark.label for line in drawing(chart)["lines"] for mark in line.marks]
    assert marks == ["a, rho 0.1: 25.0% (20.0% to 30.0%)", "a, rho 1: 50.0%", "b, rho 0.1: 25.0% (20.0% to 30.0%)"]


def test_larger_values_are_drawn_higher_and_further_right():
    chart = Chart(
        "t", "x", "y", (Series("a", (Point(1, 1.0), Point(10, 10.0), Point(100, 100.0))),), log_x=True, log_y=True
    )
    first, second, third = drawing(chart)["lines"][0].marks
    # Powers of ten are equally far apart on logarithmic axes.
    assert first.x < second.x
    assert first.y > second.y  # SVG counts downwards
    assert second.x - first.x == pytest.approx(third.x - second.x)
    assert second.y - first.y == pytest.approx(third.y - second.y)


def test_one_point_and_no_point_can_be_drawn():
    for points in ((Point(3, 0.0),), (), (Point(1, float("nan")),), (Point(0, 5.0),)):
        for log in (False, True):
            drawn = drawing(Chart("t", "x", "y", (Series("a", points),), log_x=log, log_y=log))
            assert all(0 <= mark.x <= drawn["width"] for line in drawn["lines"] for mark in line.marks)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 17, [0, 5, 10, 15]), (0.69, 0.735, [0.69, 0.7, 0.71, 0.72, 0.73])],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_seeds_are_averaged_where_all_of_them_were_measured():
    assert over_seeds([[(0, 1.0), (1, 3.0)], [(0, 2.0)]]) == (Point(0, 1.5, 1.0, 2.0),)
    assert over_seeds([[(0, 1.0)]]) == (Point(0, 1.0, None, None),)


def test_results_are_plain_json_again(tmp_path):
    path = runs.safety(tmp_path / "e.json")
    assert json.loads(path.read_text())["attack_success"]["harmbench"]["n"] == 8
    assert "harmbench" in render(collect([path]))
