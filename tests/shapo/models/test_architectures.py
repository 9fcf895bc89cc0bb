"""Value vectors of each supported architecture, checked against the modules that transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from shapo.errors import UserError
from shapo.models.architectures import ARCHITECTURES, value_vectors
from shapo.models.wrappers import unwrap

HIDDEN, INTERMEDIATE, LAYERS = 16, 24, 2
COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 1, "head_dim": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", GROUPED, "model.layers.{}.mlp.down_proj"),
    "mistral": ("MistralForCausalLM", GROUPED, "model.layers.{}.mlp.down_proj"),
    "qwen2": ("Qwen2ForCausalLM", COMMON | {"num_key_value_heads": 1}, "model.layers.{}.mlp.down_proj"),
    "qwen3": ("Qwen3ForCausalLM", GROUPED, "model.layers.{}.mlp.down_proj"),
    "gemma": ("GemmaForCausalLM", GROUPED, "model.layers.{}.mlp.down_proj"),
    "gemma2": ("Gemma2ForCausalLM", GROUPED, "model.layers.{}.mlp.down_proj"),
    "gemma3_text": ("Gemma3ForCausalLM", GROUPED, "model.layers.{}.mlp.down_proj"),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": GROUPED, "vision_config": VISION, "mm_tokens_per_image": 4},
        "model.language_model.layers.{}.mlp.down_proj",
    ),
    "phi3": ("Phi3ForCausalLM", COMMON | {"num_key_value_heads": 1}, "model.layers.{}.mlp.down_proj"),
    "gpt_neox": ("GPTNeoXForCausalLM", COMMON, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 32, "n_embd": HIDDEN, "n_inner": INTERMEDIATE, "n_layer": LAYERS, "n_head": 2}
        | {"bos_token_id": 0, "eos_token_id": 1},
        "transformer.h.{}.mlp.c_proj",
    ),
}


def build(model_type: str) -> nn.Module:
    class_name, settings, _ = CASES[model_type]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**settings))


def test_every_supported_type_is_tested() -> None:
    assert set(CASES) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", CASES)
def test_value_vectors_are_the_down_projections_of_every_layer(model_type: str) -> None:
    model = build(model_type)
    expected = [CASES[model_type][2].format(layer) for layer in range(LAYERS)]

    found = value_vectors(model)

    assert found.names == tuple(f"{name}.weight" for name in expected)
    assert found.sizes == {f"{name}.weight": INTERMEDIATE for name in expected}
    assert (found.hidden_size, found.model_type) == (HIDDEN, model_type)
    for name in expected:
        module = model.get_submodule(name)
        assert found.weights[f"{name}.weight"] is module.weight
        if found.axis == 1:
            assert type(module) is nn.Linear
            assert module.weight.shape == (HIDDEN, INTERMEDIATE)
        else:
            assert type(module) is Conv1D
            assert module.weight.shape == (INTERMEDIATE, HIDDEN)


@pytest.mark.parametrize("model_type", CASES)
def test_a_neuron_is_what_one_activation_adds_to_the_output(model_type: str) -> None:
    """Independent of classes and shapes: switching on activation i alone must write value vector i."""
    found = value_vectors(model := build(model_type))
    name = found.names[0]
    module = model.get_submodule(name.removesuffix(".weight"))
    one_hot = torch.zeros(INTERMEDIATE)
    with torch.no_grad():
        resting = module(one_hot)
        one_hot[5] = 1
        written = module(one_hot) - resting
    torch.testing.assert_close(written, found.weights[name].detach().select(found.axis, 5))


def test_a_backbone_without_its_head_is_found_too() -> None:
    model = build("llama").model
    assert value_vectors(model).names[0] == "layers.0.mlp.down_proj.weight"


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, lora, lambda model: torch.compile(lora(model))],
    ids=["compile", "data-parallel", "peft", "compile-peft"],
)
def test_wrappers_are_seen_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = build("llama")
    expected = value_vectors(model)
    wrapped = value_vectors(wrap(model))
    assert wrapped.sizes == expected.sizes
    assert all(wrapped.weights[name] is weight for name, weight in expected.weights.items())


def test_distributed_data_parallel_is_seen_through(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build("gpt2")
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert value_vectors(wrapped).names == value_vectors(model).names
        assert unwrap(wrapped) is model
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_a_mixture_of_experts_is_refused_in_one_line(class_name: str) -> None:
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**COMMON, num_key_value_heads=1))
    with pytest.raises(UserError, match="mixture of experts, which is not supported; supported types: llama") as error:
        value_vectors(model)
    assert "\n" not in str(error.value)


def test_an_unknown_type_is_refused_with_the_supported_ones() -> None:
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UserError, match="model type 'opt' is not supported; supported types: llama, mistral"):
        value_vectors(model)


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UserError, match="'Linear' is not supported"):
        value_vectors(nn.Linear(2, 2))


def test_a_model_without_the_modules_of_its_type_is_refused() -> None:
    model = build("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="no value vectors in this 'llama' model"):
        value_vectors(model)
