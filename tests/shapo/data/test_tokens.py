"""One template (T2): what is masked, what is cut, where BOS and EOS stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shapo.data.tokens import IGNORE_INDEX, Encoded, PairEncoder
from shapo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT, RESPONSE = "\n\nHuman: May I take the lamp?\n\nAssistant:", " Ask Mia first."
MARKER = "\n\nAssistant:"


def test_ids_are_bos_prompt_response_eos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = PairEncoder(tiny_tokenizer).encode(PROMPT, RESPONSE)
    assert tiny_tokenizer.decode(encoded.input_ids) == f"<|bos|>{PROMPT}{RESPONSE}<|eos|>"
    assert tiny_tokenizer.decode(encoded.input_ids[: encoded.prompt_length]) == f"<|bos|>{PROMPT}"


def test_the_boundary_is_exact_and_the_prompt_has_the_same_ids_before_any_response(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = PairEncoder(tiny_tokenizer)
    prompt = encoder.encode_prompt(PROMPT)
    for response in (RESPONSE, "x", "ant", ""):
        encoded = encoder.encode(PROMPT, response)
        assert encoded.input_ids[: encoded.prompt_length] == prompt
        assert tiny_tokenizer.decode(encoded.input_ids[encoded.prompt_length : -1]) == response


def test_a_tokenizer_that_puts_no_bos_gets_none(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast as Fast

    plain = Fast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer.__class__.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    )
    plain.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    plain.bos_token, plain.eos_token = "<|bos|>", "<|eos|>"
    assert PairEncoder(plain).encode_prompt("x")[0] != plain.bos_token_id


def test_eos_follows_only_a_response_that_was_not_cut(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tiny_tokenizer.eos_token_id
    whole = PairEncoder(tiny_tokenizer).encode(PROMPT, RESPONSE)
    size = len(whole)
    exact = PairEncoder(tiny_tokenizer, max_length=size, max_prompt_length=size - 1).encode(PROMPT, RESPONSE)
    cut = PairEncoder(tiny_tokenizer, max_length=size - 1, max_prompt_length=size - 2).encode(PROMPT, RESPONSE)
    without = PairEncoder(tiny_tokenizer, eos=False).encode(PROMPT, RESPONSE)
    assert exact.input_ids[-1] == eos
    assert cut.input_ids == whole.input_ids[:-1]
    assert without.input_ids == whole.input_ids[:-1]


LONG_PROMPT = "\n\nHuman:" + " lamp" * 60 + MARKER


def test_a_long_prompt_is_cut_from_the_left_and_keeps_bos_and_marker(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PairEncoder(tiny_tokenizer, max_length=40, max_prompt_length=20)
    encoded = encoder.encode(LONG_PROMPT, " no" * 60)
    prompt = encoded.input_ids[: encoded.prompt_length]
    assert (encoded.prompt_length, len(encoded)) == (20, 40)
    assert prompt[0] == tiny_tokenizer.bos_token_id
    assert tiny_tokenizer.decode(prompt).endswith(MARKER)
    assert prompt[1:] == encoder.encode_prompt(LONG_PROMPT, max_new_tokens=1000)[1:]


def test_a_prompt_may_use_what_a_short_response_leaves(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PairEncoder(tiny_tokenizer, max_length=40, max_prompt_length=20)
    encoded = encoder.encode(LONG_PROMPT, RESPONSE)
    assert len(encoded) == 40
    assert encoded.prompt_length > 20
    assert encoded.input_ids[-1] == tiny_tokenizer.eos_token_id


def test_a_prompt_above_its_share_stays_whole_where_everything_fits(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = PairEncoder(tiny_tokenizer).encode(PROMPT, "x")
    tight = PairEncoder(tiny_tokenizer, max_length=len(whole), max_prompt_length=2).encode(PROMPT, "x")
    assert tight == whole


@given(
    prompt=st.integers(0, 40),
    chosen=st.integers(0, 40),
    rejected=st.integers(0, 40),
    length=st.integers(2, 50),
    data=st.data(),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncation_uses_the_whole_budget_and_a_pair_shares_its_prompt(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: int, chosen: int, rejected: int, length: int, data: st.DataObject
) -> None:
    share = data.draw(st.integers(1, length - 1))
    encoder = PairEncoder(tiny_tokenizer, max_length=length, max_prompt_length=share)
    both = encoder.encode_pair("§" * prompt, "@" * chosen, "@" * rejected)
    # "§" is two bytes and "@" one, in no merge of the tokenizer's texts; BOS and EOS are one each.
    whole_prompt, whole = 1 + 2 * prompt, [chosen + 1, rejected + 1]
    assert both[0].input_ids[: both[0].prompt_length] == both[1].input_ids[: both[1].prompt_length]
    for encoded, response in zip(both, whole, strict=True):
        assert len(encoded) == min(length, encoded.prompt_length + response)
        assert (encoded.input_ids[-1] == tiny_tokenizer.eos_token_id) == (encoded.prompt_length + response <= length)
    assert both[0].prompt_length == min(
        whole_prompt, max(share, length - max(whole)) if whole_prompt + max(whole) > length else whole_prompt
    )
    assert max(map(len, both)) == min(length, whole_prompt + max(whole))


def test_collate_pads_right_and_masks_prompt_and_padding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batch = PairEncoder(tiny_tokenizer).collate([Encoded([5, 6, 7], 2), Encoded([8, 9], 0)])
    pad, off = tiny_tokenizer.pad_token_id, IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[off, off, 7], [8, 9, off]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_can_round_the_width_up(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PairEncoder(tiny_tokenizer, pad_to_multiple_of=8)
    assert encoder.collate([Encoded([1] * 9, 1)])["input_ids"].shape == (1, 16)
    assert encoder.collate([Encoded([1] * 8, 1)])["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match="needs at least one"):
        encoder.collate([])


class Stub:
    """A tokenizer with given special tokens and a character for a token."""

    backend_tokenizer = None
    chat_template = None

    def __init__(self, bos: int | None = None, eos: int | None = None, pad: int | None = None) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad

    def __call__(self, text: str | list[str], **_: object) -> dict[str, list[Any]]:
        ids = [[ord(letter) for letter in one] for one in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


@pytest.mark.parametrize(("eos", "pad", "expected"), [(3, 4, 4), (3, None, 3), (None, None, 0)])
def test_padding_takes_the_pad_token_else_eos_else_zero(eos: int | None, pad: int | None, expected: int) -> None:
    encoder = PairEncoder(Stub(eos=eos, pad=pad), eos=False)
    batch = encoder.collate([encoder.encode("ab", "c"), encoder.encode("a", "")])
    assert batch["input_ids"][1].tolist() == [ord("a"), expected, expected]
    assert batch["attention_mask"].sum() == 4


def test_an_eos_inside_a_text_is_learned_though_it_is_the_pad_token() -> None:
    encoder = PairEncoder(Stub(eos=ord("c"), pad=ord("c")))
    assert encoder.collate([encoder.encode("a", "bc")])["labels"].tolist() == [[-100, ord("b"), ord("c"), ord("c")]]


def test_chat_template_renders_the_turns_and_ends_the_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The generated data's template writes transcripts, so both ways must give the same ids."""
    transcript = "\n\nSystem: be kind\n\nHuman: May I?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant:"
    plain, chat = PairEncoder(tiny_tokenizer), PairEncoder(tiny_tokenizer, chat_template=True)
    one_turn = PROMPT, RESPONSE
    assert chat.encode(*one_turn) == plain.encode(*one_turn)
    many = chat.encode(transcript, RESPONSE)
    expected = transcript.replace(" No.", " No.<|eos|>")
    assert tiny_tokenizer.decode(many.input_ids) == f"<|bos|>{expected}{RESPONSE}<|eos|>"
    assert many.input_ids.count(tiny_tokenizer.bos_token_id) == 1
    unended = PairEncoder(tiny_tokenizer, chat_template=True, eos=False).encode(*one_turn)
    assert unended.input_ids == plain.encode(*one_turn).input_ids[:-1]


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>May I?</end>\n<assistant>|No.</end>",
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>May I?<assistant>|No.<|eos|>",
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>MAY I?<assistant>|NO.<|eos|>",
        ),
    ],
    ids=["own-end-of-turn", "no-end-of-turn", "answers-are-changed"],
)
def test_the_end_of_turn_is_the_templates_else_eos(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, rendered: str
) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    encoded = PairEncoder(tokenizer, chat_template=True).encode("\n\nHuman: May I?\n\nAssistant:", " No.")
    prompt, answer = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
    assert f"{tokenizer.decode(prompt)}|{tokenizer.decode(answer)}" == rendered


def test_settings_change_with_everything_that_decides_the_ids(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base = PairEncoder(tiny_tokenizer).settings
    assert base == PairEncoder(tiny_tokenizer).settings
    others = [
        {"max_length": 99, "max_prompt_length": 9},
        {"max_prompt_length": 9},
        {"eos": False},
        {"chat_template": True},
    ]
    assert all(PairEncoder(tiny_tokenizer, **other).settings != base for other in others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokenizer", "arguments", "message"),
    [
        (Stub(eos=1), {"max_length": 8, "max_prompt_length": 8}, "max_prompt_length is 8 and max_length 8"),
        (Stub(eos=1), {"max_prompt_length": 0}, "expected 0 < prompt < whole"),
        (Stub(), {}, "has no EOS token; give it one or pass eos=False"),
        (Stub(eos=1), {"chat_template": True}, "the tokenizer has no chat template"),
        (Stub(eos=1), {"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
    ],
)
def test_impossible_settings_are_refused(tokenizer: Stub, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairEncoder(tokenizer, **arguments)
