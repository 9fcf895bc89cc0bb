"""The files that generated command lines work on: small, whole, and made once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from shapo.cli import main
from shapo.data import synthetic
from shapo.demo import report
from shapo.models.loading import save_model
from shapo_kernels import Subspace
from tests.fuzz.lines import LINES, kinds
from tests.support.clones import make_clones
from tests.support.gguf_files import gguf_model, write_gguf
from tests.support.llamas import llama
from tests.support.tiny_study import PLAN

DOWN = "model.layers.0.mlp.down_proj.weight"
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def make(folder: Path) -> None:
    """Models, data, prompts, verdicts, a probe, a subspace, clones, a GGUF file, and a run that can be resumed.

    The demo and the study are made small for this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = synthetic.generate(0, sft=40, train=12, selection=8, test=8, test_unseen=4)
    examples = synthetic.sft_examples(rows["sft"], seed=0)
    tokenizer = synthetic.train_tokenizer((prompt + response for prompt, response in examples), 300)
    _models(folder, tokenizer)
    for split, part in rows.items():
        _write_rows(folder / f"{split}.jsonl", part)
    (folder / "pairs").mkdir()
    pairs = {"train": "train", "selection": "selection", "test": "test", "test_unseen": "test_unseen"}
    for split, source in {**pairs, "test_attacks": "test"}.items():
        _write_rows(folder / "pairs" / f"{split}.jsonl", rows[source])
    _write_rows(folder / "pairs" / "benign.jsonl", [{"prompt": a, "response": b} for a, b in examples[:6]])
    _write_rows(folder / "prompts.jsonl", [{"id": str(n), "prompt": f"Say\u2028{n}"} for n in range(3)])
    _write_rows(folder / "answers.jsonl", [{"id": str(n), "prompt": "a", "answer": "I cannot"} for n in range(3)])
    _write_rows(folder / "verdicts.jsonl", [{"id": str(n), "verdict": "safe", "judge": "j"} for n in range(4)])
    _write_rows(folder / "comparisons.jsonl", [{"first": "a", "second": "b"}])
    Subspace({DOWN: [1, 2, 20]}).save(folder / "subspace.safetensors")
    make_clones(folder)
    write_gguf(folder / "tiny.gguf", gguf_model())
    _make_small()
    quiet = ["--quiet", "--max-length", "64"]
    used = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), *quiet]
    _done(["probe", *used, "--epochs", "1", "--cache", "--output", str(folder / "probe")])
    run = ["train", *used, "--updates", "2", "--batch-size", "2", "--limit", "4", "--save-every", "1", "--warmup", "1"]
    _done([*run, "--output", str(folder / "run")])
    _done(["evaluate", *used, "--limit", "2", "--output", str(folder / "evaluation.json")])


def do_each_once(folder: Path) -> None:
    """Every command line as it should be, so that children by fork find all imported; each must end well."""
    for kind in kinds():
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(folder, Path(place) / "copy")
            os.chdir(place)
            line = [part.replace("{w}", str(Path(place) / "copy")) for part in LINES[kind]]
            _done([kind.split()[0], *line])
            os.chdir(folder)


def _done(line: list[str]) -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(line)
    if code:
        raise RuntimeError(f"{line}: {told.getvalue()}")


def _models(folder: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    size = {"vocab_size": len(tokenizer), **SIZE, "pad_token_id": tokenizer.pad_token_id}
    save_model(folder / "model", llama(**size), tokenizer)
    save_model(folder / "reward", llama(LlamaForSequenceClassification, **size, num_labels=1), tokenizer)
    get_peft_model(llama(**size), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    text = json.loads(config.read_text())
    text["base_model_name_or_path"] = str(folder / "model")
    config.write_text(json.dumps(text))


def _make_small() -> None:
    from dataclasses import replace

    from shapo.demo import run as demo
    from shapo.demo import settings
    from shapo.study import plan

    rows = {"sft": 40, "train": 4, "selection": 8, "test": 4, "test_unseen": 4}
    few = {"sft_updates": 1, "probe_rows": 20, "reward_updates": 1, "epochs": 1, "curve_pairs": 2, "sharpness_pairs": 2}
    settings.SIZES["small"] = replace(settings.SIZES["small"], rows=rows, layers=1, **few)
    methods = [method for method in settings.methods() if method.slug in ("dpo", report.FINAL_MODEL)]
    demo.methods = lambda: methods
    plan.PLANS["real"] = PLAN


def break_weights(path: Path, how: str) -> None:
    """Damages a weight file in a way that a reader of bytes does not see."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        tensors = load_file(path)
    except SafetensorError:  # its bytes were damaged before
        return
    name = sorted(tensors)[len(tensors) // 2]
    if how == "missing":
        tensors.pop(name)
    elif how == "renamed":
        tensors = {f"x.{key}": value for key, value in tensors.items()}
    elif how == "shape":
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})


def break_entry(path: Path, generator: random.Random) -> None:
    """Removes an entry of a JSON file or a tensor file (or its header), or gives it another type."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return
        if header and generator.random() < 0.5:
            name = generator.choice(sorted(header))
            header[name] = generator.choice(("", "{}", "[1]", "nan", "\u2028", header[name][: len(header[name]) // 2]))
        elif tensors:
            name = generator.choice(sorted(tensors))
            tensors[name] = generator.choice(
                (torch.zeros(0), torch.zeros(2, 2, 2), torch.full((3,), -1), torch.ones(()))
            )
        save_file(tensors, path, metadata=header)
        return
    with contextlib.suppress(ValueError, RecursionError, OSError):
        value = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(_other(value, generator)), encoding="utf-8")


def _other(value: Any, generator: random.Random) -> Any:
    if isinstance(value, dict) and value and generator.random() < 0.9:
        name = generator.choice(sorted(value))
        if generator.random() < 0.2:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: _other(value[name], generator)}
    if isinstance(value, list) and value and generator.random() < 0.7:
        place = generator.randrange(len(value))
        return [*value[:place], _other(value[place], generator), *value[place + 1 :]]
    return generator.choice((None, [], {}, "x", -1, 1e308, True, "", [[]], 3))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
