"""`--qlora`: an adapter over a base model in 4 bits, on the CPU for real; merged, apart, resumed, and under ShaPO."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from shapo.cli import main
from shapo.libraries.bitsandbytes import LINEAR4BIT
from shapo.models.adapters import Lora, add_lora
from shapo.models.loading import load_model
from shapo.training.metrics import read_metrics
from shapo_kernels import Subspace
from tests.support.folders import write_training_folder

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer, synthetic_rows):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("qlora")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    write_training_folder(folder, LlamaForCausalLM(config), tiny_tokenizer, synthetic_rows["train"])
    Subspace({DOWN: [1, 2, 30]}).save(folder / "subspace.safetensors")
    return folder


@pytest.fixture
def train(files, tmp_path, monkeypatch, capsys):
    """Trains for three updates; gives exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    data = ["--model", files / "model", "--data", files / "train.jsonl", "--limit", 12, "--max-length", 96]
    short = ["--updates", 3, "--batch-size", 4, "--lr", "1e-2", "--warmup", 0, "--quiet"]

    def run(output: str, *more: object) -> tuple[int, str]:
        code = main([str(text) for text in ["train", *data, *short, "--output", output, *more]])
        lines = capsys.readouterr().err.splitlines(keepends=True)
        return code, "".join(line for line in lines if "has a chat template" not in line)

    return run


def test_the_base_is_held_in_four_bits_and_computes_as_it_did_nearly(files):
    whole, packed = load_model(str(files / "model")), load_model(str(files / "model"), four_bit=True)
    weight = packed.model.layers[0].mlp.down_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 128 // 2)
    tokens = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        one, other = whole(tokens).logits, packed(tokens).logits
    assert 0 < (one - other).norm() / one.norm() < 0.3


def test_gradients_pass_the_base_in_four_bits_also_after_a_pass_without_any(files):
    from bitsandbytes.functional import dequantize_4bit

    packed = load_model(str(files / "model"), four_bit=True)
    dense = load_model(str(files / "model"))
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = packed.get_submodule(name).weight
            assert weight.dtype == torch.uint8, name
            module.weight.data.copy_(dequantize_4bit(weight.data, weight.quant_state))
    tokens = torch.arange(3, 19).reshape(2, 8)
    gradients = []
    for model in (packed, dense):
        adapted = add_lora(model, Lora(r=4), seed=0)
        with torch.no_grad():
            adapted(tokens)  # as the reference is asked before the first update
        adapted(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n})
    assert all(gradient.abs().max() > 0 for gradient in gradients[1].values())
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-6)


def test_bitsandbytes_layers_have_what_is_read_of_them(files):
    packed = load_model(str(files / "model"), four_bit=True)
    layer = packed.model.layers[0].mlp.down_proj
    for name in LINEAR4BIT:
        assert getattr(layer, name) is False, name


def test_a_merged_model_is_the_unrounded_base_plus_the_adapter(train, files, tmp_path):
    assert train("merged", "--qlora", "r=4") == (0, "")
    assert train("apart", "--qlora", "r=4", "--adapter", "apart") == (0, "")
    assert (tmp_path / "apart/model/adapter_config.json").is_file()
    merged, base = (load_model(str(folder)) for folder in (tmp_path / "merged/model", files / "model"))
    assert "quantization_config" not in json.loads((tmp_path / "merged/model/config.json").read_text())
    adapter = peft.PeftModel.from_pretrained(base, str(tmp_path / "apart/model"))
    layer = adapter.base_model.model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        moved = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = layer.base_layer.weight + moved
    assert moved.abs().max() > 0
    torch.testing.assert_close(merged.model.layers[0].mlp.down_proj.weight, expected)
    torch.testing.assert_close(merged.model.norm.weight, base.model.norm.weight)


def test_shapo_moves_the_adapters_or_by_delta_the_base_in_four_bits(train, files, tmp_path):
    for name, subspace in (("adapters", "adapters"), ("base", files / "subspace.safetensors")):
        code, error = train(name, "--qlora", "r=4", "--rho", "0.5", "--subspace", subspace)
        assert (code, error) == (0, ""), name
        rows = read_metrics(tmp_path / name / "metrics.jsonl", "update")
        assert all(row["shapo"]["epsilon_norm"] == pytest.approx(0.5, rel=1e-3) for row in rows)
    code, error = train("relative", "--qlora", "r=4", "--rho", "0.1", "--relative-rho", "--subspace",
                        files / "subspace.safetensors")  # fmt: skip
    assert code == 2
    assert "is quantised" in error


def test_a_run_is_resumed_to_the_bit(train, tmp_path):
    spec = ["--qlora", "r=4,dropout=0.1", "--dropout"]
    assert train("whole", *spec) == (0, "")
    assert train("parts", *spec, "--save-every", 2) == (0, "")
    assert train("parts", *spec, "--save-every", 2, "--resume") == (0, "")
    one, other = (load_model(str(tmp_path / name / "model")) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_without_bitsandbytes_it_is_one_line(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, error = train("none", "--qlora", "r=4")
    assert code == 2
    assert "--qlora needs bitsandbytes: pip install bitsandbytes" in error


def test_it_excludes_lora(train):
    code, error = train("both", "--qlora", "r=4", "--lora", "r=4")
    assert code == 2
    assert "not allowed with" in error
