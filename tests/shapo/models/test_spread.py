"""A model read once: its skeleton is the same model without weights, and tied parameters stay tied."""

import pickle

import torch
from torch import nn

from shapo.models.adapters import Lora, add_lora
from shapo.models.spread import allocated, emptied, read_once, replace_parameters, skeleton
from shapo.ranks import Ranks
from tests.support.llamas import llama


def test_a_skeleton_can_be_sent_to_another_process_and_has_no_weights():
    model = add_lora(llama(tie_word_embeddings=True), Lora(r=2), seed=0)
    sent = pickle.loads(pickle.dumps(skeleton(model)))
    assert all(weight.is_meta for weight in sent.parameters())
    own, other = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, sent))
    assert own.keys() == other.keys()
    for name, weight in own.items():
        assert (weight.shape, weight.dtype, weight.requires_grad) == (
            other[name].shape,
            other[name].dtype,
            other[name].requires_grad,
        )
    assert sent.get_output_embeddings().weight is sent.get_input_embeddings().weight
    for (name, buffer), (_, copied) in zip(model.named_buffers(), sent.named_buffers(), strict=True):
        assert torch.equal(buffer, copied), name
    assert not any(weight.is_meta for weight in model.parameters())


def test_an_emptied_model_gives_its_weights_away_and_takes_memory_again():
    model = llama(tie_word_embeddings=True)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights = emptied(model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    assert all(weight.is_meta for weight in model.parameters())
    replace_parameters(model, lambda weight: allocated(weight, torch.device("cpu")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.load_state_dict(weights)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_weights_with_values_stay_the_objects_that_they_are():
    layer = nn.Linear(2, 3)
    before = list(layer.parameters())
    replace_parameters(layer, lambda weight: allocated(weight, torch.device("cpu")))
    assert all(weight is old for weight, old in zip(layer.parameters(), before, strict=True))


def test_one_process_has_the_model_that_it_made():
    model = nn.Linear(2, 3)
    assert read_once(Ranks(), lambda: model) is model
