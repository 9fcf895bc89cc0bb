"""Models and tokenizers from local folders or the hub, and back into folders.

A model is complete or it is refused: transformers fills a tensor that a file lacks with random numbers, so its loading
report is asked for each time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shapo.checked import checked
from shapo.errors import UserError, first_line
from shapo.libraries.bitsandbytes import keep_differentiable
from shapo.models.memory import keep_freed_memory
from shapo.notes import note
from shapo.storage.files import atomic_folder


def device_of(name: str) -> torch.device:
    """Raises UserError for a device that this machine does not have, or that holds no numbers."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {name!r} cannot be used: {first_line(error)}") from error
    return device


@checked
def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    kind: str = "AutoModelForCausalLM",
    what: str = "model",
    four_bit: bool = False,
) -> Any:
    """A model from a local folder or a hub name, on the device, in eval mode. An adapter is merged into its base model.

    Args:
        name: Folder or hub name.
        dtype: Of the weights.
        device: See `device_of`.
        kind: One of transformers' auto classes.
        what: How errors call it.
        four_bit: Hold the linear layers' weights in 4 bits (NF4, arXiv:2305.14314), and compute in `dtype`.

    Raises:
        UserError: It cannot be loaded; a tensor is missing, has another shape or is not finite; a size in its
            configuration is no number above 0.
    """
    quiet_transformers()
    where = device_of(device)
    if where.type == "cpu":
        keep_freed_memory()
    _require_model_folder(name, what)
    adapter = (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file()
    if four_bit and adapter:
        raise UserError(f"--qlora: {name} is an adapter; take its base model, or --lora")
    quantised = {"quantization_config": _four_bits(dtype), "device_map": {"": where}} if four_bit else {}
    model = _merged(name, dtype, kind, what) if adapter else _complete(name, dtype, kind, what, **quantised)
    if four_bit:
        keep_differentiable(model)
    _require_sizes(model.config, f"the {what} {name}")
    for tensor, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"the {what} {name} is damaged or has diverged: {tensor} has values that are NaN or infinite"
            )
    return model.to(where).eval()


def merged_adapter(folder: Path, *, dtype: str) -> Any:
    """An adapter's base model with the adapter added, on the CPU, without a remark.

    Raises:
        UserError: as `load_model`.
    """
    return _merged(str(folder), dtype, "AutoModelForCausalLM", "model", told=False).eval()


def _four_bits(dtype: str) -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError("--qlora needs bitsandbytes: pip install bitsandbytes") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _require_sizes(config: Any, what: str) -> None:
    """A size that loading does not need would fail far from here: in a forward pass, or in generation."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for size in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        value = getattr(text, size, 1)
        if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise UserError(
                f"{what} is damaged: its config.json has {size} {value!r}, but a number above 0 is expected"
            )


def hint_at_bf16(model: Any) -> None:
    """Says once that --bf16 is faster, where a float32 model takes long and the processor computes in bfloat16."""
    parameter = next(model.parameters())
    large = sum(p.numel() for p in model.parameters()) > 50_000_000
    if parameter.device.type == "cpu" and parameter.dtype == torch.float32 and large and _computes_in_bf16():
        _say_bf16()


@cache
def _say_bf16() -> None:
    note("this processor computes in bfloat16; with --bf16 this takes less time")


def _computes_in_bf16() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(text.split()))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub name; an adapter folder without one has its base model's.

    Raises:
        UserError: There is none.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    folder = Path(name)
    has_one = any(folder.glob("*token*")) if folder.is_dir() else True
    if not has_one and (folder / "adapter_config.json").is_file():
        return load_tokenizer(_base_of(name, "model"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer("a")  # what its configuration holds of a wrong type fails here
        return tokenizer
    except Exception as error:  # as in _complete
        if not has_one:
            raise UserError(f"the model folder {name} has no tokenizer; save one beside the model") from error
        raise UserError(f"cannot load the tokenizer of {name}: {first_line(error)}") from error


def save_model(folder: Path, model: Any, tokenizer: Any, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Model and tokenizer in Hugging Face's format, the folder replaced in one step; `weights` instead of its own."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(temporary)


def quiet_transformers() -> None:
    """No bars and no remarks of transformers between ours."""
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what it reports of loading is read, and told in one line
    logging.disable_progress_bar()


def _complete(name: str, dtype: str, kind: str, what: str, **quantised: Any) -> Any:
    import transformers

    try:
        model, report = getattr(transformers, kind).from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True, **quantised
        )
    except Exception as error:  # the hub, safetensors and configuration classes each raise their own kinds
        raise UserError(f"cannot load the {what} {name}: {first_line(error)}") from error
    # A mismatched entry is a name with two shapes.
    mismatched = sorted(entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"])
    for names, problem in ((sorted(report["missing_keys"]), "lack"), (mismatched, "have in another shape")):
        if names:
            raise UserError(
                f"cannot load the {what} {name}: its files {problem} {_some(names)} of a {type(model).__name__}, "
                "which would be random; is the folder complete, and of this architecture?"
            )
    if report["error_msgs"]:
        raise UserError(f"cannot load the {what} {name}: {' '.join(str(report['error_msgs'][0]).split())}")
    if report["unexpected_keys"]:
        note(f"{name} holds {_some(sorted(report['unexpected_keys']))}, which a {type(model).__name__} does not use")
    return model


def _merged(name: str, dtype: str, kind: str, what: str, *, told: bool = True) -> Any:
    """The base model with the adapter's weights added: what is trained and saved is then one whole model."""
    base_name = _base_of(name, what)
    try:
        import peft
    except ImportError as error:
        raise UserError(f"cannot load the {what} {name}: it is an adapter, which needs `pip install peft`") from error
    base = load_model(base_name, dtype=dtype, device="cpu", kind=kind, what=f"base model of the adapter {name},")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted: Any = peft.PeftModel.from_pretrained(base, name)
            if not hasattr(adapted, "merge_and_unload"):
                raise UserError("its kind cannot be merged into weights")
            model = adapted.merge_and_unload()
    except Exception as error:
        raise UserError(f"cannot merge the adapter {name} into {base_name}: {first_line(error)}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(model.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # a head of the adapter's own: saved, it would be lost
    if told:
        note(f"{name} is an adapter and was merged into its base model {base_name}")
    return model


def _base_of(name: str, what: str) -> str:
    import json

    try:
        base = json.loads((Path(name) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the {what} {name}: adapter_config.json is damaged") from error
    if not isinstance(base, str) or not base or Path(base).resolve() == Path(name).resolve():
        raise UserError(f"cannot load the {what} {name}: it is an adapter and names no base model")
    return base


def _require_model_folder(name: str, what: str) -> None:
    """Tells what is wrong with a local folder, which transformers would look up on the hub or tell in its own terms."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            inner = path / "model"
            hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
            raise UserError(f"cannot load the {what} {name}: the folder has no config.json{hint}")
    elif path.exists():
        raise UserError(f"cannot load the {what} {name}: it is a file; expected a folder or a hub name")
    elif not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"cannot load the {what} {name!r}: there is no such folder")


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return found[0] if len(found) == 1 else f"{len(found)} tensors ({', '.join(found[:2])} ...)"
