"""Selection against direct fp64 computations: by the probe, by the gradient, at random, full."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from shapo import selection
from shapo.config import LOSSES, LossConfig
from shapo.data.formats import load_pairs
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.models.architectures import value_vectors
from shapo.scoring.logps import PairLogps
from shapo.scoring.rewards import PairRewards
from shapo_kernels import Subspace

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NAMES = tuple(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2))


@pytest.fixture
def pairs(synthetic_rows: dict[str, list[dict[str, Any]]]) -> list[PreferencePair]:
    return load_pairs(synthetic_rows["selection"])[:7]


@pytest.fixture
def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=400, n_embd=32, n_inner=48, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config)


def lowest(scores: dict[str, list[float]], count: int) -> dict[str, list[int]]:
    """The positions of the `count` lowest scores, by plain sorting."""
    ranked = sorted((score, name, index) for name, values in scores.items() for index, score in enumerate(values))
    chosen: dict[str, list[int]] = {}
    for _, name, index in sorted(ranked[:count], key=lambda entry: entry[1:]):
        chosen.setdefault(name, []).append(index)
    return chosen


def cosines(model: nn.Module, direction: Tensor) -> dict[str, list[float]]:
    """Cosine of each value vector with the direction, one dot product at a time."""
    vectors = value_vectors(model)
    target = direction.double()
    result: dict[str, list[float]] = {}
    for name, size in vectors.sizes.items():
        weight = model.get_parameter(name).detach().double()
        neurons = [weight.select(vectors.axis, index) for index in range(size)]
        result[name] = [float(v @ target / (v.norm() * target.norm())) for v in neurons]
    return result


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("percent", [1, 12.5, 100])
def test_the_probe_selects_the_neurons_most_opposed_to_unsafe(
    architecture: str, percent: float, tiny_llama: LlamaForCausalLM, tiny_gpt2: nn.Module
) -> None:
    model = tiny_llama if architecture == "llama" else tiny_gpt2
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    scores = cosines(model, direction)
    total = sum(map(len, scores.values()))

    subspace = selection.select_by_probe(model, direction, percent, metadata={"data": "generated"})

    expected = lowest(scores, max(1, round(total * percent / 100)))
    assert {name: index.tolist() for name, index in subspace.items()} == expected
    assert {subspace.axis(name) for name in subspace} == {value_vectors(model).axis}
    assert subspace.metadata == {
        "method": "probe",
        "percent": f"{percent:g}",
        "model_type": architecture,
        "data": "generated",
    }
    subspace.validate(model)


def test_scores_do_not_depend_on_the_lengths_of_direction_or_neurons(tiny_llama: LlamaForCausalLM) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    before = selection.probe_scores(tiny_llama, direction)
    with torch.no_grad():
        for name in NAMES:
            tiny_llama.get_parameter(name).mul_(torch.linspace(0.5, 20, 64))
    after = selection.probe_scores(tiny_llama, 7 * direction)
    for name in NAMES:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


def test_selection_sees_through_wrappers(tiny_llama: LlamaForCausalLM) -> None:
    direction = torch.ones(32)
    direct = selection.select_by_probe(tiny_llama, direction, 10)
    wrapped = nn.DataParallel(torch.compile(tiny_llama))
    assert selection.select_by_probe(wrapped, direction, 10) == direct
    direct.validate(wrapped)


def log_probability(model: nn.Module, encoder: PairEncoder, prompt: str, response: str) -> Tensor:
    """Of one response, by indexing one token after the other."""
    encoded = encoder.encode(prompt, response)
    logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    rows = range(encoded.prompt_length, len(encoded))
    return torch.stack([logits[row - 1, encoded.input_ids[row]] for row in rows]).sum()


def split_gradient(
    model: nn.Module, encoder: PairEncoder, pairs: list[PreferencePair], reference: PairLogps, beta: float
) -> dict[str, Tensor]:
    """The whole split as one graph: gradient of the mean DPO loss with respect to each value-vector weight."""
    terms = []
    for number, pair in enumerate(pairs):
        chosen = log_probability(model, encoder, pair.prompt, pair.chosen) - reference.chosen[number]
        rejected = log_probability(model, encoder, pair.prompt, pair.rejected) - reference.rejected[number]
        terms.append(-torch.log(torch.sigmoid(beta * (chosen - rejected))))
    names = value_vectors(model).names
    gradients = torch.autograd.grad(torch.stack(terms).mean(), [model.get_parameter(name) for name in names])
    return dict(zip(names, gradients, strict=True))


def some_reference(count: int) -> PairLogps:
    generator = torch.Generator().manual_seed(3)
    values = [-30 - 20 * torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(2)]
    return PairLogps(*values, torch.full((count,), 20), torch.full((count,), 20))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_gradient_scores_are_the_norms_of_the_gradient_of_the_whole_split(
    architecture: str,
    batch_size: int,
    tiny_llama: LlamaForCausalLM,
    tiny_gpt2: nn.Module,
    tiny_encoder: PairEncoder,
    pairs: list[PreferencePair],
) -> None:
    model = (tiny_llama if architecture == "llama" else tiny_gpt2).double()
    reference = some_reference(len(pairs))
    model.eval()
    expected = split_gradient(model, tiny_encoder, pairs, reference, beta=0.3)
    model.train()

    arguments: dict[str, Any] = {"beta": 0.3, "reference": reference, "batch_size": batch_size, "progress": False}
    scores = selection.gradient_scores(model, tiny_encoder, pairs, **arguments)
    subspace = selection.select_by_gradient(model, tiny_encoder, pairs, 10, **arguments)

    axis = value_vectors(model).axis
    for name, gradient in expected.items():
        torch.testing.assert_close(scores[name], gradient.square().sum(1 - axis).sqrt(), rtol=1e-9, atol=1e-15)
    negated = {name: (-gradient.norm(dim=1 - axis)).tolist() for name, gradient in expected.items()}
    count = math.floor(sum(map(len, negated.values())) * 0.1 + 0.5)
    assert {name: index.tolist() for name, index in subspace.items()} == lowest(negated, count)
    assert subspace.metadata["method"] == "gradient"
    assert (subspace.metadata["loss"], subspace.metadata["pairs"]) == ("dpo", "7")


def test_without_a_reference_the_model_is_its_own(
    tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, pairs: list[PreferencePair]
) -> None:
    model = tiny_llama.double().eval()
    with torch.no_grad():
        own = [
            torch.stack([log_probability(model, tiny_encoder, pair.prompt, getattr(pair, side)) for pair in pairs])
            for side in ("chosen", "rejected")
        ]
    expected = split_gradient(model, tiny_encoder, pairs, PairLogps(*own, own[0], own[1]), beta=0.1)
    scores = selection.gradient_scores(model, tiny_encoder, pairs, progress=False)
    for name, gradient in expected.items():
        torch.testing.assert_close(scores[name], gradient.norm(dim=0), rtol=1e-9, atol=1e-15)


def test_gradient_selection_leaves_the_model_as_it_was(
    tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, pairs: list[PreferencePair]
) -> None:
    tiny_llama.train()
    tiny_llama.model.embed_tokens.weight.requires_grad_(False)
    tiny_llama.get_parameter(NAMES[0]).requires_grad_(False)
    tiny_llama.lm_head.weight.grad = torch.ones_like(tiny_llama.lm_head.weight)
    flags = [parameter.requires_grad for parameter in tiny_llama.parameters()]
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}

    with torch.no_grad():
        scores = selection.gradient_scores(tiny_llama, tiny_encoder, pairs, progress=False)

    assert scores[NAMES[0]].min() > 0, "frozen value vectors are ranked too"
    assert [parameter.requires_grad for parameter in tiny_llama.parameters()] == flags
    assert [name for name, p in tiny_llama.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert torch.equal(tiny_llama.lm_head.weight.grad, torch.ones_like(tiny_llama.lm_head.weight))
    assert tiny_llama.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_flags_come_back_when_the_loss_cannot_be_computed(
    tiny_llama: LlamaForCausalLM,
    tiny_encoder: PairEncoder,
    pairs: list[PreferencePair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside: list[str] = []

    def fail(*_: object, **__: object) -> None:
        inside.extend(name for name, parameter in tiny_llama.named_parameters() if parameter.requires_grad)
        raise KeyboardInterrupt

    monkeypatch.setattr(selection, "batch_logps", fail)
    with pytest.raises(KeyboardInterrupt):
        selection.gradient_scores(tiny_llama, tiny_encoder, pairs, progress=False)
    assert inside == list(selection.neuron_sizes(tiny_llama))
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_every_pairwise_loss_can_rank(
    name: str, tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, pairs: list[PreferencePair]
) -> None:
    loss = LossConfig(name)
    rewards = PairRewards(torch.arange(7.0), torch.zeros(7)) if loss.uses_rewards else None
    arguments: dict[str, Any] = {"loss": loss, "rewards": rewards, "progress": False}
    scores = selection.gradient_scores(tiny_llama, tiny_encoder, pairs, **arguments)
    assert all(values.isfinite().all() and values.max() > 0 for values in scores.values())


@pytest.mark.parametrize("match", ["total", "layer"])
def test_random_neurons_are_as_many_and_decided_by_the_seed(match: str, tiny_llama: LlamaForCausalLM) -> None:
    first, again, other = (selection.random_subspace(tiny_llama, 12.5, seed=seed, match=match) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.count == 16
    if match == "layer":
        assert [len(first[name]) for name in NAMES] == [8, 8]
    assert first.metadata == {
        "method": f"random-{match}",
        "percent": "12.5",
        "model_type": "llama",
        "seed": "0",
    }


def test_a_matched_control_has_as_many_neurons_in_each_layer(tiny_llama: LlamaForCausalLM) -> None:
    critical = Subspace({NAMES[0]: [1, 2, 3], NAMES[1]: [7]}, metadata={"method": "probe"})
    control = selection.random_like(tiny_llama, critical, seed=4)
    assert [len(control[name]) for name in NAMES] == [3, 1]
    assert control != critical
    assert (control.metadata["method"], control.metadata["like"]) == ("random-like", "probe")


def test_full_is_every_neuron_or_every_parameter(tiny_llama: LlamaForCausalLM) -> None:
    neurons = selection.full_neurons(tiny_llama)
    assert neurons.names == NAMES
    assert neurons.count == 128
    everything = selection.full_parameters(tiny_llama)
    everything.validate(tiny_llama)
    assert set(everything) == {name for name, _ in tiny_llama.named_parameters()}
    assert (neurons.metadata["method"], everything.metadata["method"]) == ("full-neurons", "full")


@pytest.mark.parametrize("percent", [0, -1, 100.5, float("nan"), float("inf")])
def test_a_percentage_out_of_range_is_refused_before_any_work(
    percent: float, tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder
) -> None:
    for select in (
        lambda: selection.select_by_probe(tiny_llama, torch.ones(32), percent),
        lambda: selection.select_by_gradient(tiny_llama, tiny_encoder, [], percent),
        lambda: selection.random_subspace(tiny_llama, percent, seed=0),
    ):
        with pytest.raises(UserError, match=r"percent is .*; expected a number above 0, up to 100"):
            select()


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.ones(31), r"direction has the shape \[31\], the model's value vectors the length 32"),
        (torch.zeros(32), "direction is zero or not finite"),
        (torch.full((32,), math.nan), "direction is zero or not finite"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(
    direction: Tensor, message: str, tiny_llama: LlamaForCausalLM
) -> None:
    with pytest.raises(UserError, match=message):
        selection.select_by_probe(tiny_llama, direction, 1)


def test_bad_gradient_selections_are_refused(
    tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, pairs: list[PreferencePair]
) -> None:
    for arguments, message in (
        ({"loss": "nll"}, "loss"),
        ({"loss": LossConfig(aggregation="drdpo")}, "gradient of the mean loss; the aggregation is drdpo"),
        ({"loss": "reward_level"}, "reward_level needs a reward model's scores"),
        ({"rewards": PairRewards(torch.zeros(7), torch.zeros(7))}, "dpo does not use a reward model's scores"),
        ({"loss": "simpo", "reference": some_reference(7)}, "simpo does not use a reference"),
    ):
        with pytest.raises(UserError, match=message):
            selection.gradient_scores(tiny_llama, tiny_encoder, pairs, progress=False, **arguments)
    with pytest.raises(UserError, match="no preference pairs"):
        selection.gradient_scores(tiny_llama, tiny_encoder, [], progress=False)
    with torch.no_grad():
        tiny_llama.lm_head.weight[0] = math.inf
    with pytest.raises(UserError, match="gradient on the selection split is not finite"):
        selection.select_by_gradient(tiny_llama, tiny_encoder, pairs, 1, progress=False)


def test_a_quantised_weight_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    packed = nn.Parameter(torch.zeros(32 * 64 // 2, 1, dtype=torch.uint8), requires_grad=False)
    tiny_llama.model.layers[1].mlp.down_proj.weight = packed
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj.weight is quantised \(torch.uint8"):
        selection.select_by_probe(tiny_llama, torch.ones(32), 1)
    assert selection.random_subspace(tiny_llama, 100, seed=0).count == 128, "its size is still known"


def test_a_depth_selects_as_many_neurons_from_the_upper_layers_alone(
    tiny_llama: LlamaForCausalLM, pairs: list[PreferencePair], tiny_encoder: PairEncoder
) -> None:
    direction = torch.randn(value_vectors(tiny_llama).hidden_size, generator=torch.Generator().manual_seed(3))
    scores = cosines(tiny_llama, direction)
    total = sum(len(values) for values in scores.values())
    count = round(total * 0.1)
    by_probe = selection.select_by_probe(tiny_llama, direction, 10, depth=0.5)
    assert {name: index.tolist() for name, index in by_probe.items()} == lowest({NAMES[1]: scores[NAMES[1]]}, count)
    gradients = selection.gradient_scores(tiny_llama, tiny_encoder, pairs, progress=False)[NAMES[1]]
    by_gradient = selection.select_by_gradient(tiny_llama, tiny_encoder, pairs, 10, depth=0.5, progress=False)
    assert by_gradient.names == NAMES[1:]
    assert by_gradient[NAMES[1]].tolist() == sorted(gradients.argsort(descending=True)[:count].tolist())
    drawn = selection.random_subspace(tiny_llama, 10, seed=0, depth=0.5)
    assert (drawn.names, drawn.count, drawn.metadata["depth"]) == (NAMES[1:], count, "0.5")
    every = selection.full_neurons(tiny_llama, depth=0.3)  # of two layers, rounded up: one
    assert (every.names, every.count) == (NAMES[1:], total // 2)
    with pytest.raises(UserError, match="more than the upper 1 of 2 layers have"):
        selection.select_by_probe(tiny_llama, direction, 60, depth=0.5)
    for depth in (0.0, 1.5):
        with pytest.raises(UserError, match="above 0, up to 1"):
            selection.full_neurons(tiny_llama, depth=depth)
