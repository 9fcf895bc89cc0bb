"""The answers file: in the prompts' order, independent of the other prompts, and gone on with where it stopped."""

from __future__ import annotations

import json

import pytest

from shapo.answers.decoding import TransformersEngine
from shapo.answers.turns import ending
from shapo.answers.writing import prompt_requests, write_answers
from shapo.data.pairs import EvaluationPrompt
from shapo.errors import UserError

PROMPTS = [EvaluationPrompt(f"\n\nHuman: question {n}\n\nAssistant:", "c", f"id-{n}") for n in range(4)]


@pytest.fixture
def answer(tiny_llama, tiny_encoder, tmp_path):
    """Writes the answers to some prompts and returns the rows."""

    def run(prompts, name="a", *, temperature=0.0, seed=0, engine=None, batch_size=2):
        end = ending(tiny_encoder.tokenizer, tiny_llama)
        engine = engine or TransformersEngine(
            tiny_llama, tiny_encoder.tokenizer, end, max_new_tokens=8, temperature=temperature, batch_size=batch_size
        )
        path = tmp_path / f"{name}.jsonl"
        requests = prompt_requests(tiny_encoder, prompts, max_new_tokens=8, seed=seed)
        write_answers(engine, prompts, requests, path, key={"temperature": temperature, "seed": seed}, progress=False)
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_depends_on_its_prompt_and_the_seed_alone(temperature, answer, tmp_path):
    whole = answer(PROMPTS, temperature=temperature)
    assert [row["id"] for row in whole] == [prompt.identifier for prompt in PROMPTS]
    assert answer(PROMPTS[::-1], temperature=temperature)[::-1] == whole
    assert answer(PROMPTS[1:2], temperature=temperature) == whole[1:2]
    if temperature:
        assert answer(PROMPTS, temperature=temperature, seed=1) != whole
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


class Stopped(Exception):
    pass


class StopsAfter:
    """An engine that is interrupted after a number of batches."""

    def __init__(self, engine, batches):
        self.engine, self.batches, self.asked = engine, batches, 0

    def complete(self, requests, done):
        def count(indices, completions):
            done(indices, completions)
            self.asked += len(indices)
            self.batches -= 1
            if not self.batches:
                raise Stopped

        return self.engine.complete(requests, count)


def test_a_stopped_run_goes_on_and_gives_the_same_file(answer, tiny_llama, tiny_encoder, tmp_path):
    def engine(batches):
        end = ending(tiny_encoder.tokenizer, tiny_llama)
        inner = TransformersEngine(tiny_llama, tiny_encoder.tokenizer, end, max_new_tokens=8, batch_size=1)
        return StopsAfter(inner, batches)

    whole = answer(PROMPTS, "whole")
    with pytest.raises(Stopped):
        answer(PROMPTS, engine=engine(3))
    assert [path.name for path in tmp_path.glob("a*")] == ["a.jsonl.part"]
    # A kill in the middle of a line.
    with open(tmp_path / "a.jsonl.part", "a") as file:
        file.write('{"id": "id-')
    rest = engine(9)
    assert answer(PROMPTS, engine=rest) == whole
    assert rest.asked == 1
    assert [path.name for path in tmp_path.glob("a*")] == ["a.jsonl"]


def test_a_part_of_other_settings_is_refused_and_kept(answer, tiny_llama, tiny_encoder, tmp_path):
    end = ending(tiny_encoder.tokenizer, tiny_llama)
    inner = TransformersEngine(tiny_llama, tiny_encoder.tokenizer, end, max_new_tokens=8, batch_size=1)
    with pytest.raises(Stopped):
        answer(PROMPTS, engine=StopsAfter(inner, 1))
    part = (tmp_path / "a.jsonl.part").read_bytes()
    with pytest.raises(UserError, match="other settings \\(temperature\\)"):
        answer(PROMPTS, temperature=1.0)
    assert (tmp_path / "a.jsonl.part").read_bytes() == part


def test_prompts_that_share_an_id_are_refused(answer, tmp_path):
    with pytest.raises(UserError, match="same id"):
        answer([PROMPTS[0]] * 2)
    assert not list(tmp_path.iterdir())
