"""A small Llama, a small tokenizer and generated rows, shared by the tests of the package."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from shapo.data import synthetic
from shapo.data.tokens import PairEncoder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

VOCABULARY = 400


@pytest.fixture(scope="session")
def synthetic_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of every split in the PKU-SafeRLHF schema. Read only."""
    return synthetic.generate(0, sft=200, train=48, selection=48, test=32, test_unseen=32)


@pytest.fixture(scope="session")
def tiny_tokenizer(synthetic_rows: dict[str, list[dict[str, Any]]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BOS, EOS and padding. Read only."""
    examples = synthetic.sft_examples(synthetic_rows["sft"], seed=0)
    return synthetic.train_tokenizer((prompt + response for prompt, response in examples), VOCABULARY)


@pytest.fixture
def tiny_encoder(tiny_tokenizer: PreTrainedTokenizerFast) -> PairEncoder:
    return PairEncoder(tiny_tokenizer, max_length=96, max_prompt_length=64)


@pytest.fixture(scope="session")
def _tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from tests.support.llamas import llama

    return llama(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )


@pytest.fixture
def tiny_llama(_tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """Two layers of 64 neurons, random weights: a fresh copy for each test, which may change it."""
    return copy.deepcopy(_tiny_llama)


@pytest.fixture
def reward_model(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    """One layer, random weights, one score for each row."""
    from transformers import LlamaForSequenceClassification

    from tests.support.llamas import llama

    size = {"vocab_size": len(tiny_tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return llama(LlamaForSequenceClassification, seed=1, **size, num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id)
