"""Chat templates: what is trained is what `apply_chat_template` writes, for every template that is shipped."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from shapo.data.pairs import render_transcript
from shapo.data.tokens import PairEncoder, warn_of_cuts
from shapo.errors import UserError
from tests.support.chat_templates import chat_tokenizer, shipped_templates

TEMPLATES = shipped_templates()

QUESTION = [{"role": "user", "content": "May I take the lamp?"}]
CONVERSATIONS = {
    "one turn": QUESTION,
    "system": [{"role": "system", "content": "Be kind."}, *QUESTION],
    "turns": [*QUESTION, {"role": "assistant", "content": "No.\n\nIt is Mia's."}, {"role": "user", "content": "Why?"}],
}
CHOSEN, REJECTED = "Ask Mia\n\nfirst.", "Yes, as you like."


def in_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """The ids of transformers, of text or, where the template is for parts, of parts."""
    form = in_parts if takes_parts(tokenizer.chat_template) else list
    return list(tokenizer.apply_chat_template(form(messages), return_dict=True, **options)["input_ids"])


def takes_parts(template: str) -> bool:
    """The templates of models of images that index into the content."""
    return any(
        template == TEMPLATES.get(name) for name in TEMPLATES if name.startswith(("idefics", "llava", "smolvlm"))
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_is_divided_as_trl_divides_it(name: str, conversation: list[dict[str, str]]) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer = chat_tokenizer(TEMPLATES[name])
    encoder = PairEncoder(tokenizer, max_length=4096, max_prompt_length=2048, chat_template=True)
    answers = [{"role": "assistant", "content": text} for text in (CHOSEN, REJECTED)]
    try:
        opened = rendered(tokenizer, conversation, add_generation_prompt=True)
        wholes = [rendered(tokenizer, [*conversation, answer]) for answer in answers]
    except Exception as refusal:
        with pytest.raises(UserError, match=f"the chat template refuses a conversation: {re.escape(str(refusal))}"):
            encoder.encode_pair(render_transcript(conversation), f" {CHOSEN}", f" {REJECTED}")
        return
    boundary = min(data_utils.common_prefix_length(opened, whole) for whole in wholes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair = encoder.encode_pair(render_transcript(conversation), f" {CHOSEN}", f" {REJECTED}")
    assert [found.prompt_length for found in pair] == [boundary, boundary]
    assert len(caught) == (boundary < len(opened)), "as TRL, with a warning where the generation prompt is another"
    for found, whole in zip(pair, wholes, strict=True):
        without_end = tokenizer.decode(whole).rstrip().endswith((CHOSEN, REJECTED))
        ours = found.input_ids[:-1] if without_end else found.input_ids
        assert whole[: len(ours)] == ours
        assert tokenizer.decode(whole[len(ours) :]).strip() == "", "the break between turns alone is left out"
        assert not without_end or found.input_ids[-1] == tokenizer.eos_token_id
    assert encoder.encode_prompt(render_transcript(conversation)) == opened


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("qwen3", "<think>\n\n</think>\n\nYes.<|im_end|>"),
        ("qwen2_5", "Yes.<|im_end|>"),
        ("gptoss", "<|channel|>final<|message|>Yes.<|return|>"),
        ("deepseek_r1_distill", "Yes.<\uff5cend▁of▁sentence\uff5c>"),
        ("glm4moe", "\n<think></think>\nYes.</s>"),
        ("phi3", "Yes.<|end|>\n</s>"),
        ("smolvlm", " Yes.<end_of_utterance>"),
        ("mistral", " Yes.</s>"),
    ],
)
@pytest.mark.filterwarnings("ignore:the chat template writes the generation prompt")
def test_what_is_trained_is_the_answered_turn_of_the_template(name: str, trained: str) -> None:
    if name not in TEMPLATES:
        pytest.skip("TRL is not installed")
    tokenizer = chat_tokenizer(TEMPLATES[name])
    encoded = PairEncoder(tokenizer, chat_template=True).encode(render_transcript(QUESTION), " Yes.")
    assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == trained


def test_a_prompt_that_is_tokenised_apart_gives_the_ids_of_the_whole() -> None:
    """Under a tokenizer that writes a mark before the first word alone, dividing must not give a second first word."""
    from tokenizers import pre_tokenizers

    tokenizer = chat_tokenizer(TEMPLATES["zephyr"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    messages = [{"role": "user", "content": "</s> May I?"}]
    whole = rendered(tokenizer, [*messages, {"role": "assistant", "content": "No."}])
    encoded = PairEncoder(tokenizer, chat_template=True).encode(render_transcript(messages), " No.")
    assert encoded.input_ids == whole[: len(encoded)]
    assert tokenizer.decode(whole[len(encoded) :]).replace("\u2581", "").strip() == ""


def test_without_eos_the_end_of_turn_is_not_learned() -> None:
    tokenizer = chat_tokenizer(TEMPLATES["zephyr"])
    encoded = PairEncoder(tokenizer, chat_template=True, eos=False).encode(render_transcript(QUESTION), " Yes.")
    assert tokenizer.decode(encoded.input_ids[encoded.prompt_length :]) == "\nYes."


ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
OPENED = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHANGED = "{% if messages[-1].role == 'assistant' %}answered{% endif %}"
MARKED = (
    CHANGED
    + "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{% generation %}{{ m.content }}</assistant>"
    "{% endgeneration %}{% else %}<user>{{ m.content }}</user>{% endif %}{% endfor %}" + OPENED
)


def test_generation_marks_tell_the_answer_where_the_prompt_is_no_prefix() -> None:
    tokenizer = chat_tokenizer(MARKED)
    conversation = render_transcript(CONVERSATIONS["turns"])
    with pytest.warns(UserWarning, match="writes the generation prompt otherwise") as warned:
        pair = PairEncoder(tokenizer, chat_template=True).encode_pair(conversation, " Yes.", " No.")
    assert warned[0].filename == __file__
    for encoded, answer in zip(pair, ("Yes.", "No."), strict=True):
        prompt, trained = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
        assert tokenizer.decode(trained) == f"{answer}</assistant>"
        assert tokenizer.decode(prompt).startswith("answered<user>May I take the lamp?</user>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHANGED + ROLES + OPENED, "what to learn cannot be told"),
        ("{% for m in messages %}<{{ m.role }}>{% endfor %}", "writes neither question nor answer"),
        ("{{ raise_exception('not\n today') }}", "refuses a conversation: not today"),
        ("{{ messages[0].content.missing.deep }}", "refuses a conversation: .* has no attribute 'missing'"),
        ("{% for m in messages %}", "refuses a conversation: Unexpected end of template"),
        ({"tool_use": ROLES}, "refuses a conversation: "),
    ],
    ids=["another-prompt", "no-content", "raises", "undefined", "broken", "no-default"],
)
def test_an_unusable_template_gives_one_line(template: Any, message: str) -> None:
    tokenizer = chat_tokenizer(ROLES)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        PairEncoder(tokenizer, chat_template=True).encode(render_transcript(QUESTION), " Yes.")
    assert "\n" not in str(error.value)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    encoder = PairEncoder(chat_tokenizer(TEMPLATES["mistral"]), chat_template=True)
    good, bad = (render_transcript(CONVERSATIONS[name]) for name in ("turns", "system"))
    with pytest.raises(UserError, match=r"^pair 2: the chat template refuses .* roles must alternate"):
        encoder.encode_pairs([(good, " a", " b"), (bad, " a", " b")])


SYSTEM = {"role": "system", "content": "Be kind."}
HEADED = "{{ bos_token }}" + ROLES + OPENED


def test_a_cut_keeps_bos_system_message_and_headers_and_drops_the_oldest_exchange_first() -> None:
    tokenizer = chat_tokenizer(HEADED)
    messages = [SYSTEM, *CONVERSATIONS["turns"]]
    shorter = [SYSTEM, messages[-1]]
    expected = "<s><system>Be kind.</system><user>Why?</user><assistant>"
    room = len(rendered(tokenizer, shorter, add_generation_prompt=True))
    encoder = PairEncoder(tokenizer, max_length=room + 20, max_prompt_length=room, chat_template=True)
    chosen, rejected = encoder.encode_pair(render_transcript(messages), " " + "y" * 30, " No.")
    whole = len(rendered(tokenizer, messages, add_generation_prompt=True))
    assert tokenizer.decode(chosen.input_ids[: chosen.prompt_length]) == expected
    assert tokenizer.decode(chosen.input_ids[chosen.prompt_length :]) == "y" * 20
    assert tokenizer.decode(rejected.input_ids) == f"{expected}No.</assistant>"
    assert (chosen.prompt_cut, chosen.response_cut) == (whole - room, 10 + len("</assistant>"))
    assert (rejected.prompt_cut, rejected.response_cut) == (whole - room, 0)


def test_a_single_question_loses_its_beginning_behind_its_header() -> None:
    tokenizer = chat_tokenizer(HEADED)
    messages = [SYSTEM, {"role": "user", "content": "a" * 100 + "z"}]
    empty = len(rendered(tokenizer, [SYSTEM, {"role": "user", "content": ""}], add_generation_prompt=True))
    encoder = PairEncoder(tokenizer, max_length=empty + 10, max_prompt_length=empty + 5, chat_template=True)
    found = encoder.encode_prompt(render_transcript(messages), max_new_tokens=5)
    assert tokenizer.decode(found) == "<s><system>Be kind.</system><user>aaaaz</user><assistant>"


def test_a_system_message_without_room_leaves_bos_and_the_end() -> None:
    tokenizer = chat_tokenizer(HEADED)
    messages = [{"role": "system", "content": "s" * 100}, *QUESTION]
    encoder = PairEncoder(tokenizer, max_length=30, max_prompt_length=20, chat_template=True)
    found = encoder.encode_prompt(render_transcript(messages), max_new_tokens=10)
    assert (len(found), tokenizer.decode(found[:1])) == (20, "<s>")
    assert tokenizer.decode(found).endswith("</user><assistant>")


def test_cut_texts_are_counted() -> None:
    tokenizer = chat_tokenizer(HEADED)
    encoder = PairEncoder(tokenizer, max_length=10, max_prompt_length=8)
    encoded = [encoder.encode("a" * size, "b" * other) for size, other in ((2, 2), (20, 1), (2, 20), (20, 20))]
    with pytest.warns(UserWarning, match="3 texts have more than 10 tokens: 2 prompts, 2 responses are cut"):
        warn_of_cuts(encoded, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cuts(encoded[:1], 10)
