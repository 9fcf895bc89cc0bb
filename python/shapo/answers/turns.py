"""What ends an answer: the end-of-sequence ids that tokenizer and model know, the chat template's end of turn, and for
transcripts the marker of the next turn.

A model whose template ends turns with another token than the stored end of sequence would otherwise go on into turns
that it invents, and a judge would read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shapo.data.pairs import MARKERS
from shapo.errors import UserError

_PROBE = "8f2c41"  # stands where the answer would; no template writes it by itself


@dataclass(frozen=True)
class Ending:
    """An answer ends before the first of `ids`, or before the first of the strings `texts`."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


def ending(tokenizer: Any, model: Any = None, *, chat_template: bool = False) -> Ending:
    """How answers end for this tokenizer, the model that generates (its stored ids count too) and the prompts' form."""
    ids: list[int] = []
    stored = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    config = getattr(getattr(model, "config", None), "eos_token_id", None)
    for value in (tokenizer.eos_token_id, stored, config):
        ids += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if wrong := [value for value in ids if not isinstance(value, int) or isinstance(value, bool)]:
        raise UserError(
            f"the model's generation_config.json or config.json has the eos_token_id {wrong[0]!r}, but numbers of "
            "tokens are expected"
        )
    texts: tuple[str, ...] = tuple(MARKERS.values())
    if chat_template:
        end_id, end_text = _template_end(tokenizer)
        ids += [] if end_id is None else [end_id]
        texts = (end_text,) if end_text else ()
    return Ending(tuple(dict.fromkeys(ids)), texts)


def _template_end(tokenizer: Any) -> tuple[int | None, str | None]:
    """The token that the template puts behind an answer, or the text where it is no token of its own."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    tail = whole.rpartition(_PROBE)[2].lstrip(" ")
    if not tail.strip():
        return None, None
    first = tokenizer(tail, add_special_tokens=False)["input_ids"][0]
    if first in tokenizer.added_tokens_decoder or first in tokenizer.all_special_ids:
        return int(first), None
    return None, tail.rstrip()
