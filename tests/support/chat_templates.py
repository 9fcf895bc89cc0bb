"""The chat templates that transformers and TRL ship, each with a small tokenizer that knows its special tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(r"<[|\uff5c][^<>{}\s'\"]*?[|\uff5c]>|<\|?[a-z_]+\|?>|</[a-z_]+>|\[/?[A-Z_]+\]")

# Templates that no installed package ships, of the kinds that differ: roles that must alternate, no end of turn.
_PUBLISHED = {
    "mistral": "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}",
}


def shipped_templates() -> dict[str, str]:
    """Name -> template; TRL's where it is installed."""
    import importlib.util

    from transformers.models.llama4 import processing_llama4
    from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor
    from transformers.models.smolvlm import processing_smolvlm

    templates = {
        **_PUBLISHED,
        "transformers-llama4": processing_llama4.chat_template,
        "transformers-smolvlm": processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
    }
    if (shipped := getattr(Qwen2AudioProcessor, "default_chat_template", None)) is not None:
        templates["transformers-qwen2-audio"] = shipped.fget(None)
    trl = importlib.util.find_spec("trl")
    if trl is not None and trl.origin is not None:
        for path in sorted((Path(trl.origin).parent / "chat_templates").glob("*.jinja")):
            templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes, with a merge of two line breaks as most vocabularies have, and the template's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    breaks = "Ċ"
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, breaks * 2])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(breaks, breaks)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(template)))})
    tokenizer.chat_template = template
    return tokenizer
