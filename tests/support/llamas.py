"""Llamas with random weights, small enough for every test."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(kind=LlamaForCausalLM, *, seed=0, **config):
    torch.manual_seed(seed)
    return kind(LlamaConfig(**{**SMALL, **config}))
