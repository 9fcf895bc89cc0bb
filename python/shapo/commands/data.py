"""Looks at a set of preference pairs before it is trained on: `shapo data check FILE`.

Counts pairs and rows left out, duplicates, labels that contradict each other, prompts in common with --against (an
evaluation set, say), answers that begin with their prompt, lengths, and the balance of labels, safety flags and
categories. With --model, whose tokenizer alone is loaded, lengths are tokens, what --max-length would cut is counted,
and one pair is written out as the model will see it, with what is trained between « and ». A line that begins with "!"
needs a look. Nothing is changed; --output keeps the numbers as JSON.

FILE is what --data is elsewhere: a file, a folder of splits or a hub name.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.commands import common
from shapo.errors import UserError
from shapo.options import Group, option, positive_int, read

SUMMARY = "duplicates, leaks, lengths, cuts and balance of a set of pairs, before training"


def _check_alone(text: str) -> str:
    if text != "check":
        raise UserError(f"`shapo data` looks at a file with the word check before its name: shapo data check {text}")
    return text


@dataclass(frozen=True)
class CheckOptions:
    """What to look at, and what to compare it with."""

    action: str = option("the word check", parse=_check_alone, metavar="check", positional=True)
    file: str = option("preference pairs", metavar="FILE", positional=True, reads=True)
    against: str | None = option(
        "pairs whose prompts should not be among these, as for FILE", None, metavar="FILE", reads=True
    )
    model: str | None = option("folder or hub name whose tokenizer is used", None, metavar="NAME", reads=True)
    pair: int = option("the pair that is written out", 1, parse=positive_int, metavar="N", needs=("model",))
    output: str | None = option("JSON file of the numbers", None, metavar="FILE", writes=True)


OPTIONS = (
    Group(CheckOptions),
    Group(common.FormatOptions, "data"),
    Group(common.TokenOptions, "tokens", needs=common.needing(common.TokenOptions, "model")),
)


def run(arguments: argparse.Namespace) -> None:
    from shapo.data.check import check_pairs, render_pair, report_lines
    from shapo.data.tokens import PairEncoder
    from shapo.models.loading import load_tokenizer
    from shapo.storage.files import require_writable, write_json

    output = require_writable(arguments.output) if arguments.output else None
    encoder = None
    if arguments.model:
        encoder = PairEncoder(
            load_tokenizer(arguments.model),
            max_length=arguments.max_length,
            max_prompt_length=read(common.TokenOptions, arguments).prompt_length(),
            chat_template=arguments.chat_template,
        )
    pairs = common.load_sources([arguments.file], arguments)
    if arguments.pair > len(pairs):
        raise UserError(f"--pair is {arguments.pair}, but there are {len(pairs)} pairs")
    against = common.load_sources([arguments.against], arguments, limit=None) if arguments.against else None
    report = check_pairs(pairs, against=against, encoder=encoder)
    print("\n".join(report_lines(report)))
    if encoder is not None:
        print("\n".join(["", f"pair {arguments.pair}:", *render_pair(pairs[arguments.pair - 1], encoder)]))
    if output is not None:
        write_json(output, report)
        print(f"written: {output}")
