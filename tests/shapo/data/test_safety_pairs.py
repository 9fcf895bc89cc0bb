"""Pairs from clones of two repositories: rules on made-up clones, and the shared pairs where there are real ones."""

import gzip
import json
import os
from pathlib import Path

import pytest

from shapo.data.formats import load_pairs
from shapo.data.safety_pairs import LEFT_OUT, SPLITS, UNSEEN, make_safety_pairs, write_safety_pairs
from shapo.errors import UserError
from tests.support.clones import make_clones


@pytest.fixture
def clones(tmp_path):
    return make_clones(tmp_path)


def test_a_pair_is_what_two_judges_agree_on(clones):
    rows = make_safety_pairs(*clones)
    for split in ("train", "selection", "test", "test_unseen"):
        for row in rows[split]:
            safe, unsafe = row[f"response_{row['safer_response_id']}"], row[f"response_{1 - row['safer_response_id']}"]
            assert (safe[:3], unsafe[:4]) == ("no,", "yes,")
            assert row["source"] in safe
            assert row["source"] in unsafe
    texts = [row[f"response_{1 - row['safer_response_id']}"] for row in rows["test_attacks"]]
    assert {text.split()[0] for text in texts} == {"PAIR", "DSN"}


def test_prompts_are_divided_by_category_and_never_cross(clones):
    rows = make_safety_pairs(*clones)
    prompts = {split: {row["prompt"] for row in rows[split]} for split in SPLITS}
    assert [len(prompts[split]) for split in ("train", "selection", "test", "test_unseen")] == [12, 4, 4, 20]
    assert len(set.union(*(prompts[s] for s in ("train", "selection", "test", "test_unseen")))) == 40
    assert prompts["test_attacks"] == prompts["test"] | prompts["test_unseen"]
    assert all(any(category in p for category in UNSEEN) for p in prompts["test_unseen"])
    assert not [p for some in prompts.values() for p in some if LEFT_OUT[0] in p]


def test_the_same_clones_and_seed_give_the_same_files(clones, tmp_path):
    counts = write_safety_pairs(*clones, tmp_path / "a", seed=3)
    write_safety_pairs(*clones, tmp_path / "b", seed=3)
    write_safety_pairs(*clones, tmp_path / "c", seed=4)
    for split in SPLITS:
        text = (tmp_path / "a" / f"{split}.jsonl").read_bytes()
        assert text == (tmp_path / "b" / f"{split}.jsonl").read_bytes()
        assert text.count(b"\n") == counts[split]
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


def test_the_loader_reads_them_with_their_labels(clones, tmp_path):
    write_safety_pairs(*clones, tmp_path / "out")
    pairs = load_pairs(tmp_path / "out" / "train.jsonl")
    assert len(pairs) == 24
    assert not pairs.dropped
    assert all(pair.rejected_unsafe and not pair.chosen_unsafe for pair in pairs)
    assert {pair.category for pair in pairs} == {"Fraud/Deception", "Malware/Hacking"}


def test_long_answers_are_cut_between_words(clones):
    path = clones[0] / "pipeline/runs/one/completions/jailbreakbench_ablation_evaluations.json"
    found = json.loads(path.read_text())
    for entry in found["completions"]:
        entry["response"] = "word " * 200
    path.write_text(json.dumps(found))
    rows = [row for row in make_safety_pairs(*clones)["train"] if row["source"] == "one"]
    assert {row[f"response_{1 - row['safer_response_id']}"] for row in rows} == {" ".join(["word"] * 80)}


def test_a_folder_that_is_no_clone_is_named(clones, tmp_path):
    with pytest.raises(UserError, match="no clone of andyrdt/refusal_direction"):
        make_safety_pairs(tmp_path / "nowhere", clones[1])
    (clones[1] / "attack-artifacts/JBC/manual/llama.json").write_text("{")
    with pytest.raises(UserError, match="is the clone complete"):
        make_safety_pairs(*clones)


SHARED = Path(os.environ.get("SHAPO_SAFETY_PAIRS", Path(__file__).parents[3].parent / "shared/data/safety-pairs"))
CLONES = os.environ.get("SHAPO_SAFETY_CLONES")


@pytest.mark.skipif(
    not (CLONES and SHARED.is_dir()), reason="SHAPO_SAFETY_CLONES names no folder with clones of the two repositories"
)
def test_real_clones_give_the_shared_pairs_and_those_of_one_more_model_in_the_tests():
    def read(split):
        with gzip.open(SHARED / f"{split}.jsonl.gz", "rt") as lines:
            return [json.loads(line) for line in lines]

    def key(row):
        first = row["safer_response_id"]
        return row["prompt"], row["source"], row[f"response_{first}"], row[f"response_{1 - first}"]

    splits = ("train", "selection", "test", "test_unseen")
    shared = {key(r) for s in splits for r in read(s)}
    rows = make_safety_pairs(Path(str(CLONES)) / "refusal_direction", Path(str(CLONES)) / "artifacts")
    own = {key(r) for s in splits for r in rows[s]}
    assert shared <= own
    assert {source for _, source, _, _ in own - shared} == {"yi-6b-chat"}


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "artifacts/attack-artifacts/DSN/white_box/vicuna.json",
            lambda found: {},
            "a list of answers under jailbreaks",
        ),
        ("artifacts/attack-artifacts/DSN/white_box/vicuna.json", lambda found: 3, "a list of answers under jailbreaks"),
        (
            "refusal_direction/pipeline/runs/one/completions/harmless_baseline_completions.json",
            lambda found: [found[0], {"prompt": "p"}],
            "answer 2 has no usable response",
        ),
        (
            "refusal_direction/pipeline/runs/one/completions/jailbreakbench_ablation_evaluations.json",
            lambda found: {"completions": [{**found["completions"][0], "category": None}]},
            "answer 1 has no usable category",
        ),
    ],
)
def test_a_clone_of_another_form_gives_one_line(name, damage, message, clones, tmp_path):
    path = tmp_path / name
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        make_safety_pairs(*clones)
