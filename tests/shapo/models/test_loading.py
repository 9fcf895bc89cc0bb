"""A model is complete or it is refused; an adapter becomes one whole model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shapo.errors import UserError
from shapo.models.loading import device_of, load_model, load_tokenizer, save_model
from shapo.scoring.rewards import load_reward_scorer

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama, tiny_tokenizer, tmp_path):
    save_model(tmp_path / "model", tiny_llama, tiny_tokenizer)
    return tmp_path / "model"


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def renamed(tensors):
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(LAYER), f"lack {LAYER} of a LlamaForCausalLM, which would be random"),
        (renamed, "lack 21 tensors"),
        (lambda tensors: tensors.update({LAYER: tensors[LAYER][:5].clone()}), f"have in another shape {LAYER}"),
        (lambda tensors: tensors[LAYER].view(-1)[7:8].fill_(torch.nan), f"{LAYER} has values that are NaN"),
    ],
    ids=["a tensor missing", "all renamed", "another shape", "NaN"],
)
def test_a_model_that_would_be_partly_random_is_refused(edit, message, folder):
    change(folder, edit)
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def test_another_architectures_weights_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 8, "n_head": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="of a GPT2LMHeadModel, which would be random"):
        load_model(str(folder))


def test_a_tensor_too_many_is_named_and_the_model_is_the_same(folder, tiny_llama, capsys):
    change(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    model = load_model(str(folder))
    assert "shapo: note" in (told := capsys.readouterr().err)
    assert "holds extra.weight, which a LlamaForCausalLM does not use" in told
    for name, value in tiny_llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_reward_model_without_its_head_is_refused(folder, reward_model, tiny_tokenizer, tmp_path):
    save_model(tmp_path / "reward", reward_model, tiny_tokenizer)
    load_reward_scorer(str(tmp_path / "reward"), sign="reward", device=torch.device("cpu"))
    change(tmp_path / "reward", lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(UserError, match=r"cannot load the reward model .* lack score\.weight"):
        load_reward_scorer(str(tmp_path / "reward"), sign="reward", device=torch.device("cpu"))


@pytest.mark.parametrize("saved", [[], ["lm_head"]], ids=["lora", "modules_to_save"])
def test_an_adapter_is_merged_into_a_model_that_can_be_trained_and_saved(saved, folder, tiny_tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved or None, init_lora_weights=False)
    adapted = peft.get_peft_model(load_model(str(folder)), config)
    with torch.no_grad():
        adapted.get_output_embeddings().weight.mul_(1.5 if saved else 1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(5, 17)[None]
    model = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(model(tokens).logits, adapted.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    save_model(tmp_path / "whole", model, load_tokenizer(str(tmp_path / "adapter")))
    again = load_model(str(tmp_path / "whole"))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_an_adapter_that_cannot_be_merged_is_refused(folder, tmp_path):
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load_model(str(folder)), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="its kind cannot be merged"):
        load_model(str(tmp_path / "prompt"))
    lora = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(load_model(str(folder)), lora).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot merge the adapter"):
        load_model(str(tmp_path / "lora"))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="cannot load the base model of the adapter"):
        load_model(str(tmp_path / "lora"))


@pytest.mark.parametrize("name", ["meta", "cuda:99", "tpu", ""])
def test_a_device_that_computes_nothing_is_refused(name):
    with pytest.raises(UserError, match="cannot be used"):
        device_of(name)


def set_entry(path, key, value):
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.mark.parametrize("value", [-1, 0, "x", 2.5])
def test_a_size_of_another_kind_is_one_line(value, folder):
    set_entry(folder / "config.json", "max_position_embeddings", value)
    with pytest.raises(UserError, match=r"max_position_embeddings|cannot load the model"):
        load_model(str(folder), device="cpu")


def test_no_layers_at_all_is_no_model(folder):
    set_entry(folder / "config.json", "num_hidden_layers", -1)
    with pytest.raises(UserError, match=r"num_hidden_layers -1, but a number above 0|cannot load"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("value", ["x", [], {}])
def test_a_tokenizer_that_fails_in_use_is_refused_when_it_is_loaded(value, folder):
    set_entry(folder / "tokenizer_config.json", "model_max_length", value)
    with pytest.raises(UserError, match="cannot load the tokenizer of"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("pad", [-1, 10**6])
def test_a_reward_model_that_pads_with_no_token_is_refused(pad, reward_model, tiny_tokenizer):
    from shapo.scoring.rewards import RewardScorer

    reward_model.config.pad_token_id = pad
    with pytest.raises(UserError, match=f"pads with id {pad}, but has"):
        RewardScorer(reward_model, tiny_tokenizer)
