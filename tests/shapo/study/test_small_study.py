"""The plan of one core, every job of it, on a tiny model: its choices, its second round and the controls."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from shapo.data.noise import flip_labels
from shapo.sharpness import loss_increase
from shapo.study.jobs import study_jobs
from shapo.study.methods import comparison_table
from shapo.study.queue import read_rows
from shapo.study.report import write_report
from shapo.study.trial import Trial
from tests.support.tiny_study import PART, SMALL, TIMES, prepare, work

pytestmark = pytest.mark.slow

WIDE = "shapo-gradient-10-wide"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    prepare(folder)
    work(folder, folder / "study", plan=SMALL, log=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return read_rows(folder / "study")


def test_workers_that_are_killed_again_and_again_leave_the_same_rows(folder, rows):
    command = [sys.executable, "-m", "tests.support.tiny_study", str(folder), "again"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 5
    found = read_rows(folder / "again")
    assert sorted(found) == sorted(PART)
    assert {rows[name]["kind"] for name in PART} == {row["kind"] for row in rows.values()}
    for name, row in found.items():
        assert {k: v for k, v in row.items() if k not in TIMES} == {
            k: v for k, v in rows[name].items() if k not in TIMES
        }
    lines = [line.split(":")[0] for line in (folder / "again.log").read_text().splitlines()]
    assert sorted(lines) == sorted(set(lines))  # a job with a row is not done again


def last_loss(row):
    return row["watched"][-1]["loss"]


def test_every_job_leaves_a_row_without_an_error(rows):
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert sorted(rows) == sorted(job.name for job in study_jobs(SMALL))


def test_the_lower_rate_is_the_best_of_all_rates_on_the_selection_split(rows):
    tuned = {row["lr"]: last_loss(row) for name, row in rows.items() if name.startswith("tune-dpo")}
    assert len(tuned) == len(SMALL.lrs) + len(SMALL.slower)
    best = min(tuned, key=tuned.get)
    assert rows["choice-slower"]["end"] == {"lr": best, "loss": tuned[best]}
    slower = [row for name, row in rows.items() if "-slower-" in name and row["kind"] == "train"]
    assert [row["lr"] for row in slower] == [best] * 3


def test_the_head_alone_takes_the_wide_rise_and_leaves_the_tied_embedding_out(rows, folder):
    trial = Trial(str(folder / "model"), folder / "pairs", folder / "study", SMALL, device="cpu")
    space = trial.subject.space("head")
    assert [space.own_layer(name) for name in space.names] == [True]
    increase = loss_increase(trial.subject.loss("matching"), space, rows["match-wide-head"]["rho"])
    assert increase == pytest.approx(rows["match-wide-head"]["rise"], rel=1e-4)
    assert rows["shapo-head-wide-noise0.4-seed0"]["rho"] == rows["match-wide-head"]["rho"]


def test_a_parameter_of_a_loss_is_the_best_tried_on_the_selection_split_and_the_one_that_runs_take(rows):
    for loss, key in (("rdpo", "epsilon"), ("drdpo", "beta_prime")):
        tuned = {row["settings"][key]: last_loss(row) for name, row in rows.items() if name.startswith(f"tune-{loss}-")}
        assert len(set(tuned.values())) == 3  # a parameter that never reached the loss would give three equal ones
        best = min(tuned, key=tuned.get)
        assert rows[f"best-{loss}"][key] == best
        plain = {"rdpo": 0.4, "drdpo": 1.0}[loss]
        same = rows[f"{loss}-tuned-noise0.4-seed0"]["test"]["h"] == rows[f"{loss}-noise0.4-seed0"]["test"]["h"]
        assert same == (best == plain)


def test_other_noise_rates_flip_as_many_labels_and_keep_their_models_apart(rows):
    assert rows["dpo-noise0.2-seed0"]["flipped"] < rows["dpo-noise0.4-seed0"]["flipped"]
    assert rows["dpo-noise0-seed0"]["flipped"] == 0
    assert rows["dpo-noise0-seed0"]["settings"]["keep"] == "dpo-noise0"
    assert rows["dpo-noise0.4-seed0"]["settings"]["keep"] == "dpo"
    compared = {(e["method"], e["baseline"]) for e in comparison_table(rows, SMALL.beta) if e["noise"] == 0}
    assert {(WIDE, "dpo"), (WIDE, "shapo-all-wide"), (WIDE, "shapo-like-probe-10-wide")} <= compared


def test_the_wide_round_takes_the_better_rise_and_is_matched_at_it(rows):
    tuned = {row["settings"]["target"]: last_loss(row) for name, row in rows.items() if name.startswith("tune-shapo")}
    assert rows["wider"]["target"] == min(tuned, key=tuned.get)
    for name, row in rows.items():
        if name.startswith("match-wide"):
            assert row["rise"] == pytest.approx(rows["wider"]["target"], rel=0.1)
    assert rows[f"{WIDE}-noise0.4-seed0"]["rho"] == rows["match-wide-gradient-10"]["rho"]


def test_controls_start_from_the_same_pairs_as_the_method_they_are_compared_with(rows):
    table = comparison_table(rows, SMALL.beta)
    compared = {(entry["method"], entry["baseline"]) for entry in table}
    assert {(WIDE, "dpo-slower"), (WIDE, "shapo-all-wide"), (f"{WIDE}-slower", "shapo-all-wide-slower")} <= compared
    assert (WIDE, "shapo-all-wide-slower") not in compared
    assert (f"{WIDE}-reward", "dpo-reward") in compared


def test_rewards_follow_the_answers_when_a_label_is_flipped(folder):
    trial = Trial(str(folder / "model"), folder / "pairs", folder / "study", SMALL, device="cpu")
    pairs = trial.subject.data.read("train")
    clean, flipped = (trial.measuring.rewards(some) for some in (pairs, flip_labels(pairs, 1.0, seed=0)))
    assert clean.chosen.tolist() == flipped.rejected.tolist()
    assert clean.rejected.tolist() == flipped.chosen.tolist()
    assert clean.chosen.tolist() != clean.rejected.tolist()


def test_the_soft_labels_of_all_training_pairs_are_in_each_histogram(rows, folder):
    row = rows["reward"]
    assert [sum(counts) for counts in row["histograms"].values()] == [16] * 4
    assert list(row["histograms"]) == list(row["saturated"])[:4]
    write_report(folder / "study")
    assert (folder / "study" / "soft_labels.png").read_bytes().startswith(b"\x89PNG")


def test_figure_1_after_alignment_is_about_the_trained_model_and_its_own_reference(rows):
    start, after = (rows[f"aligned-{name}-gradient-10"] for name in ("start", "dpo"))
    assert start["loss_at_theta"] == pytest.approx(math.log(2))
    assert abs(after["loss_at_theta"] - math.log(2)) > 1e-3
    again = rows["aligned-shapo-gradient-10-gradient-10"]
    assert again["loss_at_theta"] != after["loss_at_theta"]


def test_refusals_are_counted_for_each_prompt_once(rows, folder):
    lines = "".join((folder / "pairs" / f"{name}.jsonl").read_text() for name in ("test", "test_unseen")).splitlines()
    tests = [json.loads(line) for line in lines]
    for name in ("start", "dpo", "shapo-all-wide-slower"):
        row = rows[f"answers-{name}"]
        assert len(row["harmful"]["refused"]) == len({test["prompt"] for test in tests})
        assert len(row["harmless"]["refused"]) == SMALL.benign_texts
        assert 0 < row["harmful"]["tokens"] <= SMALL.answer_tokens


def test_the_report_has_a_section_for_each_kept_model_and_the_head(folder):
    text = write_report(folder / "study").read_text()
    assert "Figure 1 at the model of `start`" in text
    assert "Figure 1 at the model of `dpo`" in text
    assert "pairs of held-out prompts" in text
    assert "| shapo-all-wide-slower | 0 of" in text.split("Refusals in generated answers")[1]
    assert "| rdpo, epsilon 0.2 | - | 100 |" in text
    assert "| drdpo, beta_prime 0.25 | - | 100 |" in text
    assert text.split("## Not run")[1].strip() == "Everything was run."
