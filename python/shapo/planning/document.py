"""Writes the table of docs/planning.md: `python -m shapo.planning.document`, some minutes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shapo.planning.report import make_plan, plan_lines

DOCUMENT = "docs/planning.md"

# The shapes of Llama 3.
_SHARED: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
#: Options of the two tables beside --model.
OPTIONS = "--engine fsdp2 --ranks 8 --batch-size 32 --micro-batch-size 2 --length 1024 --gradient-checkpointing"
_BEGIN, _END = "<!-- plan {} -->", "<!-- /plan -->"


def table_lines(model: str, ways: Sequence[str] = ()) -> list[str]:
    """A model's table as Markdown, of all ways or some."""
    from transformers import LlamaConfig

    from shapo.cli import build_parser

    with TemporaryDirectory() as folder:
        LlamaConfig(**_SHARED, **MODELS[model]).save_pretrained(folder)
        chosen = [argument for way in ways for argument in ("--way", way)]
        arguments = build_parser().parse_args(["plan", "--model", folder, *OPTIONS.split(), *chosen])
        return plan_lines(make_plan(arguments), markdown=True)


def rows_of(text: str, model: str) -> list[str]:
    """The lines between a document's marks of a model."""
    return text.partition(_BEGIN.format(model))[2].partition(_END)[0].splitlines()


def write(path: Path) -> None:
    """Puts the tables between their marks."""
    text = path.read_text(encoding="utf-8")
    for model in MODELS:
        before, mark, rest = text.partition(_BEGIN.format(model))
        after = rest.partition(_END)[2]
        text = "\n".join([f"{before}{mark}", "", *table_lines(model), "", f"{_END}{after}"])
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else DOCUMENT))
