"""The files that generated command lines work on: small, whole, and made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from shapo.cli import main
from shapo.data import synthetic
from shapo.models.loading import save_model
from shapo_kernels import Subspace
from tests.support.llamas import llama

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
    """Model, adapter, reward model, data, prompts, verdicts, probe, subspace and a run that can be resumed."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    rows = synthetic.generate(0, sft=40, train=12, selection=8, test=8, test_unseen=4)
    examples = synthetic.sft_examples(rows["sft"], seed=0)
    tokenizer = synthetic.train_tokenizer((prompt + response for prompt, response in examples), 300)
    model = llama(vocab_size=len(tokenizer), **SIZE, pad_token_id=tokenizer.pad_token_id)
    save_model(folder / "model", model, tokenizer)
    reward = llama(
        LlamaForSequenceClassification,
        vocab_size=len(tokenizer),
        **SIZE,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(folder / "reward", reward, tokenizer)
    for split, part in rows.items():
        _write_rows(folder / f"{split}.jsonl", part)
    _write_rows(folder / "prompts.jsonl", [{"id": str(n), "prompt": f"Say\u2028{n}"} for n in range(3)])
    _write_rows(folder / "answers.jsonl", [{"id": str(n), "prompt": "a", "answer": "I cannot"} for n in range(3)])
    _write_rows(folder / "verdicts.jsonl", [{"id": str(n), "verdict": "safe", "judge": "j"} for n in range(4)])
    _write_rows(folder / "comparisons.jsonl", [{"first": "a", "second": "b"}])
    Subspace({DOWN: [1, 2, 20]}).save(folder / "subspace.safetensors")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    text = json.loads(config.read_text())
    text["base_model_name_or_path"] = str(folder / "model")
    config.write_text(json.dumps(text))
    quiet = ["--quiet", "--max-length", "64"]
    used = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), *quiet]
    assert main(["probe", *used, "--epochs", "1", "--cache", "--output", str(folder / "probe")]) == 0
    run = ["train", *used, "--updates", "2", "--batch-size", "2", "--limit", "4", "--save-every", "1", "--warmup", "1"]
    assert main([*run, "--output", str(folder / "run")]) == 0


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


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
