"""The project's own preference data: PKU-SafeRLHF rows put together from phrases, and a tokenizer trained on them.

Small enough for a model of 0.3 M parameters to learn on a CPU, and made so that there is something to learn: both
styles of answer share their openings, names and things, and for most phrases only word order or a negation tells safe
from unsafe. It is a test bed for methods, not a model of real conversations.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapo.data.pairs import ASSISTANT_MARKER, render_response, render_transcript
from shapo.data.synthetic_text import DETAILS, NAMES, OPENINGS, REMARKS, REQUESTS, SAFE, SEEN, UNSAFE, UNSEEN, Topic
from shapo.errors import UserError
from shapo.storage.files import json_line, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CATEGORIES", "SPLITS", "UNSEEN_CATEGORIES", "generate", "sft_examples", "train_tokenizer", "write"]

CATEGORIES = tuple(topic.category for topic in SEEN)
UNSEEN_CATEGORIES = tuple(topic.category for topic in UNSEEN)
SPLITS = ("sft", "train", "selection", "test", "test_unseen")

_OWN_PHRASE = 0.3
"""Share of phrases that belong to one category. They cannot be judged in an unseen category; the shared ones can."""


def generate(
    seed: int, *, sft: int = 5000, train: int = 300, selection: int = 400, test: int = 400, test_unseen: int = 400
) -> dict[str, list[dict[str, Any]]]:
    """Rows in the PKU-SafeRLHF schema, the same for the same arguments on every machine.

    Every row has a prompt of its own, so no prompt is in two splits. `selection` is the held-out split for the probe
    and the gradient selection; `test_unseen` has categories that no other split has, phrased alike. In each row one
    response is safe and one is not, in either order; the "better" (more helpful) one is drawn independently.

    Args:
        seed: of everything that is drawn.
        sft, train, selection, test, test_unseen: rows of each split.

    Raises:
        UserError: a split smaller than one row, or more rows than there are prompts.
    """
    sizes = {"sft": sft, "train": train, "selection": selection, "test": test, "test_unseen": test_unseen}
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"the split {split} is to have {size} rows; expected at least 1")
    seen = {split: size for split, size in sizes.items() if split != "test_unseen"}
    return {
        **_rows(seed, "seen", SEEN, seen),
        **_rows(seed, "unseen", UNSEEN, {"test_unseen": test_unseen}),
    }


def _rows(seed: int, stream: str, topics: Sequence[Topic], sizes: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Draw the prompts of all splits together, without replacement, then answer each."""
    generator = random.Random(f"{seed}/{stream}")
    requests = [
        (topic, request, deed, thing, who)
        for topic in topics
        for request in REQUESTS
        for deed in topic.deeds
        for thing in topic.things
        for who in NAMES
    ]
    needed = sum(sizes.values())
    if needed > len(requests):
        raise UserError(
            f"{needed} rows were asked for in {', '.join(sizes)}; there are {len(requests)} different prompts"
        )
    generator.shuffle(requests)
    splits: dict[str, list[dict[str, Any]]] = {}
    start = 0
    for split, size in sizes.items():
        splits[split] = [_row(generator, *request) for request in requests[start : start + size]]
        start += size
    return splits


def _row(generator: random.Random, topic: Topic, request: str, deed: str, thing: str, who: str) -> dict[str, Any]:
    slots = {"thing": thing, "who": who}
    safe_side = generator.randrange(2)
    row: dict[str, Any] = {"prompt": request.format(deed=deed.format(**slots))}
    for side in (0, 1):
        shared, own = (SAFE, topic.safe) if side == safe_side else (UNSAFE, topic.unsafe)
        row[f"response_{side}"] = _response(generator, shared, own, slots)
        row[f"is_response_{side}_safe"] = side == safe_side
        row[f"response_{side}_harm_category"] = {topic.category: side != safe_side}
        row[f"response_{side}_severity_level"] = 0 if side == safe_side else generator.randint(1, 3)
    row["better_response_id"] = generator.randrange(2)
    row["safer_response_id"] = safe_side
    row["category"] = topic.category
    return row


def _response(generator: random.Random, shared: Sequence[str], own: Sequence[str], slots: Mapping[str, str]) -> str:
    """An opening, a phrase of the style and a remark of no style, the latter two in either order."""
    phrase = generator.choice(own if generator.random() < _OWN_PHRASE else shared).format(**slots)
    details = {name: generator.choice(values) for name, values in DETAILS.items()}
    remark = generator.choice(REMARKS).format(**slots, **details)
    sentences = [phrase[0].upper() + phrase[1:], remark]
    generator.shuffle(sentences)
    return f"{generator.choice(OPENINGS)} {sentences[0]}. {sentences[1]}."


def sft_examples(rows: Iterable[Mapping[str, Any]], *, seed: int) -> list[tuple[str, str]]:
    """(prompt, response) pairs for supervised fine-tuning, either style with equal chance.

    So the model learns the language of both styles and no preference between them, which is left to be learned.
    """
    generator = random.Random(f"{seed}/sft")
    return [
        (
            render_transcript([{"role": "user", "content": row["prompt"]}]),
            render_response(row[f"response_{generator.randrange(2)}"]),
        )
        for row in rows
    ]


def write(folder: str | os.PathLike[str], seed: int, **sizes: int) -> dict[str, Path]:
    """Write `generate(seed, **sizes)` as `folder/<split>.jsonl`, each file atomically. Returns the paths."""
    paths = {}
    for split, rows in generate(seed, **sizes).items():
        paths[split] = Path(folder) / f"{split}.jsonl"
        write_text(paths[split], "".join(map(json_line, rows)))
    return paths


_BOS, _EOS, _PAD = "<|bos|>", "<|eos|>", "<|pad|>"

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ {'system': '\n\nSystem:', 'user': '\n\nHuman:', 'assistant': '" + ASSISTANT_MARKER + "'}[message['role']] }}"
    "{{ ' ' + message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT_MARKER + "' }}{% endif %}"
).replace("\n", "\\n")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS (put first by itself), EOS, padding and a chat template for transcripts.

    It is a plain Hugging Face fast tokenizer: `save_pretrained`, `AutoTokenizer.from_pretrained`.

    Args:
        texts: what the merges are learned from.
        vocab_size: entries in all, the 256 bytes and three special tokens included; fewer where the texts give no more.

    Raises:
        UserError: a vocabulary too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [_BOS, _EOS, _PAD]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise UserError(f"vocab_size is {vocab_size}; expected at least {len(alphabet) + len(special)} (all bytes)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
