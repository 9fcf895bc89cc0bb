"""GGUF files of small Llamas, written by the package gguf."""

import numpy as np

from tests.support.llamas import llama

HEADS, LAYERS, HIDDEN, INTERMEDIATE = 4, 2, 32, 64
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"


def permuted(weight):
    """Rotary weights as llama.cpp stores them: the two halves of each head interleaved."""
    heads = weight.reshape(HEADS, 2, weight.shape[0] // HEADS // 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, *, template=TEMPLATE, architecture="llama", quantised=False):
    import gguf

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


def gguf_model():
    """A model that `write_gguf` writes."""
    return llama(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
    ).eval()
