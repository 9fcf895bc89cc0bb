"""Harmful fine-tuning: which answers it learns, what it measures along the way, and that splits stay apart."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from shapo.attack import AttackConfig, clear_attack, harmful_examples, run_attack, split_examples
from shapo.cli import main
from shapo.data.pairs import EvaluationPrompt, PreferencePair
from shapo.errors import UserError
from shapo.judges.files import read_rows
from shapo.judges.others import CallableJudge
from shapo.judges.refusal import RefusalJudge
from shapo.safety import safety_summary
from shapo.training.loop import METRICS
from shapo.training.metrics import read_metrics

PROMPTS = [EvaluationPrompt(f"\n\nHuman: other {n}\n\nAssistant:", "", str(n)) for n in range(3)]
EXAMPLES = [(f"\n\nHuman: ask {n // 2}\n\nAssistant:", f" go on {n}") for n in range(20)]
SMALL = AttackConfig(steps=3, examples=8, held_out=3, every=2, lr=1e-2, batch_size=4, max_new_tokens=4)


def test_the_answers_marked_unsafe_are_learned_each_once():
    pairs = [
        PreferencePair("p", "safe", "bad", chosen_unsafe=False, rejected_unsafe=True),
        PreferencePair("p", "bad", "worse", chosen_unsafe=True, rejected_unsafe=True),
        PreferencePair("q", "a", "b", chosen_unsafe=False, rejected_unsafe=False),
    ]
    assert harmful_examples(pairs) == [("p", "bad"), ("p", "worse")]
    assert harmful_examples([PreferencePair("q", "a", "b")]) == [("q", "b")]


def test_seeds_draw_other_examples_and_share_what_is_held_out():
    (first, held), (second, again) = (split_examples(EXAMPLES, SMALL, seed) for seed in (0, 1))
    assert held == again
    assert len(held) == 3
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    for training in (first, second):
        assert not {prompt for prompt, _ in training} & {prompt for prompt, _ in held}


def test_too_few_answers_are_reported():
    with pytest.raises(UserError, match="needs 8 harmful answers"):
        split_examples(EXAMPLES[:8], SMALL, 0)


@pytest.mark.parametrize("lora", [0, 2])
def test_an_attack_is_sft_measured_from_its_first_step(lora, tiny_llama, tiny_encoder, tmp_path):
    seen, before = [], copy.deepcopy(tiny_llama.state_dict())

    def judge(prompts, answers):
        seen.append((list(prompts), list(answers)))
        return ["unsafe", "safe", "?"]

    results = run_attack(
        lambda: copy.deepcopy(tiny_llama), tiny_encoder, EXAMPLES, PROMPTS, CallableJudge(judge),
        config=AttackConfig(**{**vars(SMALL), "lora": lora}), seeds=[0, 1], output=tmp_path, progress=False,
        benign=[EvaluationPrompt("\n\nHuman: bake\n\nAssistant:", "", "bake")],
    )  # fmt: skip
    # The judge is asked about harmful prompts alone; benign ones are counted apart.
    assert {point["over_refusal"]["n"] for row in results for point in row["curve"]} == {1}
    rows = read_rows(tmp_path / "seed-1" / "verdicts-2.jsonl", ("verdict",))
    assert [(row["id"], row["verdict"]) for row in rows] == [("0", "unsafe"), ("1", "safe"), ("2", "unreadable")]
    compared = safety_summary(
        [tmp_path / "seed-1" / "verdicts-3.jsonl"],
        against=tmp_path / "seed-1" / "verdicts-0.jsonl",
        benign=tmp_path / "seed-1" / "benign-3.jsonl",
    )
    assert (compared["difference"]["n"], compared["difference"]["left_out"]) == (2, 1)
    assert [row["seed"] for row in results] == [0, 1]
    for row in results:
        assert [point["step"] for point in row["curve"]] == [0, 2, 3]
        shares = [(point["attack_success"]["low"], point["attack_success"]["high"]) for point in row["curve"]]
        assert shares == [(1 / 3, 2 / 3)] * 3
    assert all(prompts == [prompt.prompt for prompt in PROMPTS] for prompts, _ in seen)
    # Both seeds begin with the same model, which is asked once: at step 0, and twice more for each seed.
    assert len(seen) == 1 + 2 * 2
    for name in ("verdicts-0.jsonl", "benign-0.jsonl"):
        assert (tmp_path / "seed-1" / name).read_text() == (tmp_path / "seed-0" / name).read_text()
    # Step 0 is the aligned model itself, whatever the seed; training lowers the loss of the harmful answers.
    start, other = (row["curve"][0]["loss"] for row in results)
    assert start == other
    if not lora:
        assert all(row["curve"][-1]["loss"] < start for row in results)
    updates = read_metrics(tmp_path / "seed-0" / METRICS, "update")
    assert [update["lr"] for update in updates] == [1e-2] * 3
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize("lora", [0, 2])
def test_what_the_generation_config_stores_changes_no_answer(lora, tiny_llama, tiny_encoder, tmp_path):
    def answers(folder, **stored):
        seen, model = [], copy.deepcopy(tiny_llama)
        model.generation_config.update(**stored)
        judge = CallableJudge(lambda prompts, answers: seen.extend(answers) or ["safe"] * len(answers))
        config = AttackConfig(**{**vars(SMALL), "lora": lora, "steps": 1, "max_new_tokens": 16})
        run_attack(lambda: copy.deepcopy(model), tiny_encoder, EXAMPLES, PROMPTS, judge,
                   config=config, seeds=[0], output=tmp_path / folder, progress=False)  # fmt: skip
        return seen

    assert answers("plain") == answers("stored", repetition_penalty=50.0)


def test_prompts_that_are_trained_on_are_refused(tiny_llama, tiny_encoder, tmp_path):
    shared = [EvaluationPrompt(EXAMPLES[0][0], "", "0")]
    with pytest.raises(UserError, match="1 of the prompts to answer are prompts of the attack's data"):
        run_attack(
            lambda: tiny_llama, tiny_encoder, EXAMPLES, shared, CallableJudge(lambda p, a: []),
            config=SMALL, seeds=[0], output=tmp_path,
        )  # fmt: skip


def test_the_command_writes_curves_and_a_plot(tmp_path, tiny_llama, tiny_tokenizer, synthetic_rows, capsys):
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows[name]))
    arguments = [
        "attack", "--model", tmp_path / "model", "--data", tmp_path / "train.jsonl",
        "--prompts", tmp_path / "test.jsonl", "--prompts-limit", 4, "--judge", "refusal-substring",
        "--steps", 2, "--every", 1, "--examples", 8, "--held-out", 4, "--seeds", 2, "--lr", "1e-3",
        "--max-new-tokens", 4, "--max-length", 96, "--max-prompt-length", 64,
        "--output", tmp_path / "out", "--quiet",
    ]  # fmt: skip
    assert main([str(part) for part in arguments]) == 0
    result = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert result["judge"] == "refusal-substring"
    assert result["judge_digest"] == RefusalJudge().digest
    assert result["benign"] is None
    assert [[point["step"] for point in row["curve"]] for row in result["seeds"]] == [[0, 1, 2]] * 2
    assert (tmp_path / "out" / "attack.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(part) for part in arguments]) == 2
    assert "already holds an attack" in capsys.readouterr().err


def test_what_an_earlier_attack_left_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-2").mkdir()
    stale = ["attack.json", "attack.png", "seed-1/metrics.jsonl", "seed-1/verdicts-0.jsonl", "seed-2/benign-5.jsonl"]
    for name in (*stale, "notes.txt", "seed-1/mine.txt"):
        (tmp_path / name).write_text("x")
    clear_attack(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == ["notes.txt", "seed-1/mine.txt"]
    assert not (tmp_path / "seed-2").exists()
