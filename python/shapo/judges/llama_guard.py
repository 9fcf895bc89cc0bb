"""Llama Guard 3 (meta-llama/Llama-Guard-3-8B, -1B) and 4 (meta-llama/Llama-Guard-4-12B).

The tokenizer's chat template writes task, categories and conversation. The output is a line "safe", or "unsafe" and a
line of categories (S1 to S14) with commas between them. Of version 4, which reads images too, the language model is
loaded.
"""

from __future__ import annotations

from typing import Any

from shapo.judges.base import Family, Messages, Verdict, last_line_verdict, with_answer

_SOURCE = "meta-llama/PurpleLlama, Llama-Guard3/8B/MODEL_CARD.md; the input is the tokenizer's chat template"


def write(tokenizer: Any, messages: Messages, answer: str) -> list[str]:
    return [str(tokenizer.apply_chat_template(with_answer(messages, answer), tokenize=False))]


def write_4(tokenizer: Any, messages: Messages, answer: str) -> list[str]:
    """Version 4 takes images too, so its template wants each content as a list of parts."""
    parts = [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in with_answer(messages, answer)
    ]
    return [str(tokenizer.apply_chat_template(parts, tokenize=False))]


def read(text: str) -> Verdict:
    return last_line_verdict(text, "unsafe", "safe", after_unsafe=r"S\d{1,2}(\s*,\s*S\d{1,2})*")


_MARKS = ("<BEGIN CONVERSATION>", "<END CONVERSATION>", "<BEGIN UNSAFE CONTENT CATEGORIES>")
FAMILY_3 = Family("llama-guard-3", _SOURCE, write, read, max_new_tokens=24, marks=_MARKS)
FAMILY_4 = Family("llama-guard-4", _SOURCE, write_4, read, max_new_tokens=24, marks=_MARKS)
