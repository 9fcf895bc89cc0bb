"""Models and tokenizers from local folders or the hub, and back into folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shapo.errors import UserError
from shapo.storage.files import atomic_folder


def device_of(name: str) -> torch.device:
    """Raises UserError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_model(name: str, *, dtype: str = "float32", device: str = "auto", kind: str = "AutoModelForCausalLM") -> Any:
    """A model from a local folder or a hub name, on the device, in eval mode; `kind` is one of transformers' auto
    classes.

    Raises:
        UserError: It cannot be loaded.
    """
    import transformers

    quiet_transformers()
    where = device_of(device)
    _require_model_folder(name)
    try:
        model: Any = getattr(transformers, kind).from_pretrained(name, dtype=getattr(torch, dtype))
    except Exception as error:  # the hub, safetensors and configuration classes each raise their own kinds
        raise UserError(f"cannot load the model {name}: {_first_line(error)}") from error
    return model.to(where).eval()


def _require_model_folder(name: str) -> None:
    """Tells what is wrong with a local folder, which transformers would look up on the hub or tell in its own terms."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            inner = path / "model"
            hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
            raise UserError(f"cannot load the model {name}: the folder has no config.json{hint}")
    elif path.exists():
        raise UserError(f"cannot load the model {name}: it is a file; expected a folder or a hub name")
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"cannot load the model {name!r}: there is no such folder")


def quiet_transformers() -> None:
    """No bars and no remarks of transformers between ours; its errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(name: str) -> Any:
    """Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as in load_model
        if Path(name).is_dir() and not any(Path(name).glob("*token*")):
            raise UserError(f"the model folder {name} has no tokenizer; save one beside the model") from error
        raise UserError(f"cannot load the tokenizer of {name}: {_first_line(error)}") from error


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Model and tokenizer in Hugging Face's format, the folder replaced in one step."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
