"""The fused head: what a model does to its logits is found out, or the logits are kept; loops end where they ended."""

from __future__ import annotations

import copy

import pytest
import torch

from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data.formats import load_pairs
from shapo.errors import UserError
from shapo.models.fused_head import FusedHead, describe_head, find_fused_head
from shapo.scoring.logps import TokenizedPairs, batch_logps, compute_logps
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences
from shapo.training.sft import train_sft
from shapo_kernels import Subspace, losses

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(kind, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(40)  # logits that a cap and a scale can be seen on
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


@pytest.fixture
def pairs(synthetic_rows, tiny_encoder):
    return TokenizedPairs(load_pairs(synthetic_rows["train"][:10]), tiny_encoder)


MODELS = {
    "llama": ({}, FusedHead(1.0, None)),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 5.0}, FusedHead(1.0, 5.0)),  # and a tied embedding
    "cohere": ({"logit_scale": 0.0625}, FusedHead(0.0625, None)),
    "granite": ({"logits_scaling": 8.0}, FusedHead(0.125, None)),
    "phi": ({}, FusedHead(1.0, None)),  # and a bias
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}, FusedHead(1.0, None)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_models_scale_cap_and_bias_are_found_and_its_log_probabilities_and_gradients_equal(kind):
    options, expected = MODELS[kind]
    model = make(kind, **options).double()
    found = describe_head(model)
    assert isinstance(found, FusedHead)
    assert found.scale == pytest.approx(expected.scale, rel=1e-6)
    assert found.softcap == (None if expected.softcap is None else pytest.approx(expected.softcap, rel=1e-6))
    head = expected  # what a stand-in in fp32 tells is good to fp32's last digit
    tokens = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(9) < 3, -100)
    sums, counts = losses.sequence_logps(model(input_ids=tokens).logits, labels)
    fused, fused_counts = head.sequence_logps(model, labels, input_ids=tokens, use_cache=False)
    torch.testing.assert_close(fused, sums, rtol=1e-9, atol=1e-9)
    assert torch.equal(counts, fused_counts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(sums.sum(), parameters, allow_unused=True),
        torch.autograd.grad(fused.sum(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-9)


def test_a_model_that_does_something_else_keeps_its_logits(tiny_llama):
    class Biased(type(tiny_llama)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

    class Squared(type(tiny_llama)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.abs() ** 0.5
            return output

    for kind, reason in ((Biased, "more than a scale"), (Squared, "more than a scale")):
        model = copy.deepcopy(tiny_llama)
        model.__class__ = kind
        assert reason in describe_head(model)
        assert find_fused_head(model) is None
        with pytest.raises(UserError, match=f"the fused head cannot serve this model, because .*{reason}"):
            find_fused_head(model, "on")
    assert "no language model" in describe_head(torch.nn.Linear(2, 2))
    assert find_fused_head(tiny_llama, "off") is None
    hooked = copy.deepcopy(tiny_llama)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert "its head has hooks" in describe_head(hooked)


def test_hooks_on_the_model_are_called_once_a_pass_with_logits_of_no_vocabulary(tiny_llama, pairs):
    seen = []
    tiny_llama.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.logits.shape)))
    head = find_fused_head(tiny_llama, "on")
    batch = pairs.batch([0, 1], torch.device("cpu"))
    batch_logps(tiny_llama, batch, head=head)
    assert seen == [(4, batch["labels"].shape[1], 0)]


def test_an_adapters_model_has_its_bases_head_and_an_adapter_on_the_head_keeps_the_logits(tiny_llama):
    peft = pytest.importorskip("peft")
    config = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False}
    adapted = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.LoraConfig(target_modules=["q_proj"], **config))
    head = find_fused_head(adapted, "on")
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    plain, fused = (batch_logps(adapted, inputs, head=choice) for choice in (None, head))
    torch.testing.assert_close(fused.chosen, plain.chosen, rtol=1e-5, atol=1e-5)
    on_head = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.LoraConfig(target_modules=["lm_head"], **config))
    assert "not a plain linear layer" in describe_head(on_head)


def test_asking_a_model_leaves_it_as_it_was(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.eval()
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    describe_head(tiny_llama)
    assert tiny_llama.training
    assert not tiny_llama.model.training
    assert "forward" not in tiny_llama.__dict__
    assert "forward" not in tiny_llama.lm_head.__dict__
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize("bf16", [False, True])
def test_log_probabilities_of_pairs_equal_those_of_the_logits_and_no_logits_are_made(bf16, tiny_llama, pairs):
    called = []
    fused, plain = (
        compute_logps(tiny_llama, pairs, bf16=bf16, fused_head=choice, progress=False) for choice in ("on", "off")
    )
    for one, other in zip(fused.tensors().values(), plain.tensors().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if bf16 else 1e-5, atol=1e-5)
    tiny_llama.lm_head.forward = lambda *_: called.append(1)
    head = FusedHead(1.0, None)
    batch_logps(tiny_llama, pairs.batch([0], torch.device("cpu")), head=head)
    assert not called


@pytest.mark.parametrize("ascent", ["selective", "grad"])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_shapo_training_ends_where_it_ends_with_logits(ascent, perturbation, tiny_llama, pairs, tmp_path):
    subspace = Subspace({f"model.layers.{i}.mlp.down_proj.weight": list(range(0, 64, 7)) for i in range(2)})
    start, ends = copy.deepcopy(tiny_llama.state_dict()), []
    for choice in ("off", "on"):
        tiny_llama.load_state_dict(start)
        loop = LoopConfig(
            updates=2, batch_size=6, micro_batch_size=4, lr=1e-2, warmup=0, optimizer="sgd", fused_head=choice
        )
        train_preferences(
            tiny_llama,
            pairs,
            loss=LossConfig(aggregation="drdpo", beta_prime=0.5),
            loop=loop,
            shapo=ShaPOConfig(rho=0.3, ascent=ascent, perturbation=perturbation),
            subspace=subspace,
            output=tmp_path / choice,
            progress=False,
        )
        ends.append((copy.deepcopy(tiny_llama.state_dict()), read_metrics(tmp_path / choice / "metrics.jsonl")))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        for key in ("loss", "accuracy", "margin", "gap", "grad_norm"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_a_subspace_with_the_head_in_it_perturbs_the_head_too(perturbation, tiny_llama, pairs, tmp_path):
    start, ends = copy.deepcopy(tiny_llama.state_dict()), []

    def run(choice):
        tiny_llama.load_state_dict(start)
        loop = LoopConfig(updates=1, batch_size=6, lr=1e-2, warmup=0, optimizer="sgd", fused_head=choice)
        train_preferences(
            tiny_llama,
            pairs,
            loss=LossConfig(),
            loop=loop,
            shapo=ShaPOConfig(rho=0.5, perturbation=perturbation),
            subspace=Subspace({"lm_head.weight": list(range(0, 300, 7))}, axis=0),
            output=tmp_path / choice,
            progress=False,
        )
        return copy.deepcopy(tiny_llama.state_dict())

    ends = [run(choice) for choice in ("off", "auto")]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="its head has hooks"):
        run("on")


def test_fine_tuning_ends_where_it_ends_with_logits(tiny_llama, tiny_encoder, tmp_path):
    start, ends = copy.deepcopy(tiny_llama.state_dict()), []
    examples = [("a question", " an answer"), ("another question", " no"), ("third", " yes, and more")]
    for choice in ("off", "on"):
        tiny_llama.load_state_dict(start)
        config = LoopConfig(
            updates=2, batch_size=3, micro_batch_size=2, lr=0.1, warmup=0, optimizer="sgd", fused_head=choice
        )
        train_sft(tiny_llama, tiny_encoder, examples, config=config, output=tmp_path / choice, progress=False)
        ends.append(copy.deepcopy(tiny_llama.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)
