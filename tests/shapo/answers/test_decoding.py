"""Greedy is the argmax, a sampled answer has its own random numbers, batches change nothing, and answers end."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch

from shapo.answers.decoding import Request, TransformersEngine
from shapo.answers.turns import Ending, ending
from shapo.answers.vllm import VLLMEngine
from shapo.errors import UserError

NEVER = Ending(())
TEXTS = ["one", "a question of some length about a diary", "and a third, which is the longest of them all by far", "x"]


def requests(tokenizer, texts=TEXTS, seed=0):
    return [Request(list(tokenizer(text)["input_ids"]), seed + n) for n, text in enumerate(texts)]


def argmaxes(model, ids, steps, end=()):
    """Greedy decoding without a cache or a batch, token by token."""
    made = []
    for _ in range(steps):
        token = int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
        if token in end:
            break
        made.append(token)
    return made


@torch.no_grad()
def test_greedy_is_the_argmax_whatever_generation_config_stores(tiny_llama, tiny_tokenizer):
    stored = {"repetition_penalty": 5.0, "num_beams": 3, "no_repeat_ngram_size": 1, "top_k": 3, "min_new_tokens": 4}
    for name, value in stored.items():
        setattr(tiny_llama.generation_config, name, value)
    before = tiny_llama.generation_config.to_dict()
    engine = TransformersEngine(tiny_llama, tiny_tokenizer, NEVER, max_new_tokens=12)
    for request, made in zip(requests(tiny_tokenizer), engine.complete(requests(tiny_tokenizer)), strict=True):
        expected = argmaxes(tiny_llama, request.ids, 12)
        assert made.text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
        assert made.tokens == 12
        assert not made.finished
    assert tiny_llama.generation_config.to_dict() == before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_give_the_answers_of_single_prompts_to_the_token(temperature, tiny_llama, tiny_tokenizer):
    def texts(batch_size, given):
        options = {"max_new_tokens": 16, "temperature": temperature, "batch_size": batch_size}
        return [c.text for c in TransformersEngine(tiny_llama, tiny_tokenizer, NEVER, **options).complete(given)]

    given = requests(tiny_tokenizer, TEXTS * 3)
    single = texts(1, given)
    assert texts(5, given) == single
    assert texts(12, given[::-1]) == single[::-1]
    if temperature:
        assert len(set(single)) > 4  # the seeds differ, so do the answers to one prompt
        assert texts(12, requests(tiny_tokenizer, TEXTS * 3, seed=100)) != single


@torch.no_grad()
def test_sampling_draws_from_the_softmax_at_the_temperature(tiny_llama, tiny_tokenizer):
    ids = list(tiny_tokenizer("one")["input_ids"])
    draws = 4000
    engine = TransformersEngine(
        tiny_llama, tiny_tokenizer, NEVER, max_new_tokens=1, temperature=0.05, batch_size=draws, first_logits=True
    )
    made = engine.complete([Request(ids, seed) for seed in range(draws)])
    expected = (tiny_llama(input_ids=torch.tensor([ids])).logits[0, -1].double() / 0.05).softmax(0)
    likely = int(expected.argmax())
    share = sum(c.text == tiny_tokenizer.decode([likely], skip_special_tokens=True) for c in made) / draws
    # Five standard errors of a share of 4,000 draws.
    assert share == pytest.approx(expected[likely].item(), abs=5 * (0.25 / draws) ** 0.5)
    assert 0.02 < expected[likely] < 0.98
    raw = made[0].first_logits.double()
    assert torch.allclose((raw / 0.05).log_softmax(0), expected.log(), atol=1e-3)


@torch.no_grad()
def test_an_answer_ends_before_an_ending_token(tiny_llama, tiny_tokenizer):
    ids = list(tiny_tokenizer("one")["input_ids"])
    whole = argmaxes(tiny_llama, ids, 10)
    stop = next(token for token in whole if whole.index(token) >= 2)
    place = whole.index(stop)
    made = TransformersEngine(tiny_llama, tiny_tokenizer, Ending((stop,)), max_new_tokens=10).complete(
        [Request(ids), *requests(tiny_tokenizer)[1:]]
    )
    assert made[0].text == tiny_tokenizer.decode(whole[:place], skip_special_tokens=True)
    assert made[0].finished
    assert made[0].tokens == place


@torch.no_grad()
def test_an_answer_ends_before_an_ending_text(tiny_llama, tiny_tokenizer):
    ids = list(tiny_tokenizer("one")["input_ids"])
    whole = tiny_tokenizer.decode(argmaxes(tiny_llama, ids, 30), skip_special_tokens=True)
    stop = whole[5:8]
    made = TransformersEngine(tiny_llama, tiny_tokenizer, Ending((), (stop,)), max_new_tokens=30).complete(
        [Request(ids)]
    )
    assert made[0].text == whole[: whole.index(stop)]
    assert made[0].finished
    assert made[0].tokens < 30


def test_a_templates_end_of_turn_ends_an_answer(tiny_llama, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    turn = "<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<|end|>\n{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    tiny_llama.generation_config.eos_token_id = [5, 6]
    found = ending(tokenizer, tiny_llama, chat_template=True)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in found.ids
    assert {tokenizer.eos_token_id, 5, 6} <= set(found.ids)
    assert found.texts == ()


def test_an_end_of_turn_that_is_no_token_is_a_text(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n###\n{% endfor %}"
    assert ending(tokenizer, chat_template=True).texts == ("\n###",)


def test_an_answer_to_a_transcript_ends_before_an_invented_turn(tiny_tokenizer):
    assert "\n\nHuman:" in ending(tiny_tokenizer).texts


@torch.no_grad()
def test_the_model_is_left_as_it_was(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    TransformersEngine(tiny_llama, tiny_tokenizer, NEVER, max_new_tokens=3, temperature=1.0).complete(
        requests(tiny_tokenizer)
    )
    assert tiny_llama.training
    assert torch.equal(torch.get_rng_state(), before)


def test_vllm_is_given_the_same_ids_seeds_and_ends(monkeypatch, tiny_tokenizer):
    """vLLM needs a GPU: what it is asked, and what is made of its output, is tested against a stand-in."""
    asked = {}

    class LLM:
        def __init__(self, **options):
            asked["options"] = options

        def generate(self, prompts, parameters, use_tqdm):
            asked["prompts"], asked["parameters"] = prompts, parameters
            text = types.SimpleNamespace(text="yes\n\nHuman: more", finish_reason="stop", token_ids=[1, 2, 3])
            return [types.SimpleNamespace(outputs=[text]) for _ in prompts]

    stub = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    engine = VLLMEngine("folder", tiny_tokenizer, Ending((7,), ("\n\nHuman:",)), max_new_tokens=9, temperature=0.5)
    given = requests(tiny_tokenizer)[:2]
    seen = []
    made = engine.complete(given, lambda indices, completions: seen.extend(indices))
    assert [c.text for c in made] == ["yes", "yes"]
    assert seen == [0, 1]
    assert asked["options"] == {"model": "folder", "dtype": "auto", "generation_config": "vllm"}
    assert [prompt["prompt_token_ids"] for prompt in asked["prompts"]] == [request.ids for request in given]
    assert [p["seed"] for p in asked["parameters"]] == [0, 1]
    assert asked["parameters"][0] | {"seed": None} == {
        "temperature": 0.5, "seed": None, "max_tokens": 9, "stop_token_ids": [7], "stop": ["\n\nHuman:"],
        "skip_special_tokens": True,
    }  # fmt: skip


def test_without_vllm_one_line_says_what_to_do(monkeypatch, tiny_tokenizer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="needs the package vllm"):
        VLLMEngine("folder", tiny_tokenizer, NEVER, max_new_tokens=1)


@pytest.mark.parametrize("value", ["x", {"a": 1}, [[1]], [1, None]])
def test_an_end_that_is_no_token_gives_one_line(value, tiny_llama, tiny_tokenizer):
    tiny_llama.generation_config.eos_token_id = value
    with pytest.raises(UserError, match=r"has the eos_token_id .*, but numbers of tokens are expected"):
        ending(tiny_tokenizer, tiny_llama)
