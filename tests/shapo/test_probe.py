"""The probe (T6): pooling by the mask, a split by prompt, a cache that is only used for what it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from shapo import probe as probing
from shapo.data.formats import load_pairs
from shapo.data.noise import flip_labels
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.probe import Probe, ProbeExample, extract_features, probe_examples, train_probe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM


@pytest.fixture
def examples(synthetic_rows: dict[str, list[dict[str, Any]]]) -> list[ProbeExample]:
    return probe_examples(load_pairs(synthetic_rows["selection"][:7]))


def test_examples_are_both_responses_with_their_own_flags_also_after_noise() -> None:
    pairs = [PreferencePair("p", "good", "bad", "", False, True), PreferencePair("q", "x", "y", "", None, True)]
    expected = [ProbeExample("p", "good", False), ProbeExample("p", "bad", True), ProbeExample("q", "y", True)]
    assert probe_examples(pairs) == expected
    flipped = probe_examples(flip_labels(pairs, 1.0, seed=0))
    assert sorted(flipped, key=str) == sorted(expected, key=str)


def test_pairs_without_flags_are_refused() -> None:
    with pytest.raises(UserError, match="no safety labels to train a probe on"):
        probe_examples([PreferencePair("p", "a", "b")])


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_features_are_means_of_the_hidden_states_of_each_text_alone(
    layer: int, tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, examples: list[ProbeExample]
) -> None:
    found = extract_features(tiny_llama, tiny_encoder, examples, batch_size=4, layer=layer, progress=False)
    reference = tiny_llama.double().eval()
    for feature, example in zip(found, examples, strict=True):
        ids = torch.tensor([tiny_encoder.encode(example.prompt, example.response).input_ids])
        states = reference(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(feature.double(), states[layer][0].mean(0), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32


def test_a_warning_of_cut_texts_names_the_callers_line(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any, examples: list[ProbeExample]
) -> None:
    encoder = PairEncoder(tiny_tokenizer, max_length=8, max_prompt_length=4)
    with pytest.warns(UserWarning, match="texts have more than 8 tokens") as warned:
        extract_features(tiny_llama, encoder, examples[:2], progress=False)
    assert warned[0].filename == __file__


def test_extraction_leaves_the_model_as_it_was(
    tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, examples: list[ProbeExample]
) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    features = extract_features(torch.compile(tiny_llama), tiny_encoder, examples, progress=False)
    assert not features.requires_grad
    assert tiny_llama.training
    assert not tiny_llama.model.layers[1].training


def test_features_of_a_bf16_model_are_averaged_in_fp32(
    tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, examples: list[ProbeExample]
) -> None:
    tiny_llama.bfloat16()
    ids = torch.tensor([tiny_encoder.encode(examples[0].prompt, examples[0].response).input_ids])
    states = tiny_llama.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    found = extract_features(tiny_llama, tiny_encoder, examples[:1], progress=False)[0]
    torch.testing.assert_close(found.double(), states[0].double().mean(0), rtol=1e-5, atol=1e-6)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each batch that goes through a model."""
    calls: list[int] = []
    inner = probing._hidden_states

    def counting(*arguments: Any) -> Tensor:
        calls.append(1)
        return inner(*arguments)

    monkeypatch.setattr(probing, "_hidden_states", counting)
    return calls


def test_a_cache_is_used_for_the_same_weights_tokens_and_settings_only(
    tiny_llama: LlamaForCausalLM,
    tiny_encoder: PairEncoder,
    examples: list[ProbeExample],
    counted: list[int],
    tmp_path: Path,
) -> None:
    path = tmp_path / "features.safetensors"

    def extract(**changes: Any) -> Tensor:
        arguments = {"model": tiny_llama, "encoder": tiny_encoder, "examples": examples, **changes}
        return extract_features(**arguments, cache=path, progress=False, batch_size=100)

    first = extract()
    assert torch.equal(extract(), first)
    assert len(counted) == 1, "the second call reads the cache"
    shorter = PairEncoder(tiny_encoder.tokenizer, max_length=30, max_prompt_length=20)
    for changes in ({"layer": 1}, {"encoder": shorter}, {"examples": examples[::-1]}, {"bf16": True}):
        before = len(counted)
        assert not torch.equal(extract(**changes), first)
        assert len(counted) == before + 1, f"{changes} must not be answered from the cache"
    extract()
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] += 0.5
    assert not torch.equal(extract(), first)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing temporary is left"


@pytest.mark.parametrize("content", ["other", "damaged"])
def test_a_file_that_is_no_feature_cache_is_refused_and_kept(
    content: str, tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, examples: list[ProbeExample], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    if content == "other":
        save_file({"features": torch.zeros(14, 32)}, path)
    else:
        path.write_bytes(b"nothing of the kind")
    before = path.read_bytes()
    with pytest.raises(UserError, match="is no readable feature cache and is left as it is"):
        extract_features(tiny_llama, tiny_encoder, examples, cache=path, progress=False)
    assert path.read_bytes() == before


def test_bad_extractions_are_refused(
    tiny_llama: LlamaForCausalLM, tiny_encoder: PairEncoder, examples: list[ProbeExample]
) -> None:
    with pytest.raises(UserError, match="no examples to extract"):
        extract_features(tiny_llama, tiny_encoder, [], progress=False)
    with pytest.raises(UserError, match="layer is 3; the model has the hidden states 0 to 2"):
        extract_features(tiny_llama, tiny_encoder, examples, layer=3, progress=False)
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="hidden states are not finite"):
        extract_features(tiny_llama, tiny_encoder, examples, progress=False)


def separable(count: int = 400, hidden: int = 8) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Two classes half a unit either side of a plane, four rows to a prompt; and the plane's normal."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(hidden, generator=generator)
    normal /= normal.norm()
    unsafe = torch.arange(count) % 2 == 1
    noise = torch.randn(count, hidden, generator=generator)
    noise -= (noise @ normal)[:, None] * normal
    return (
        noise + torch.where(unsafe, 0.5, -0.5)[:, None] * normal,
        unsafe,
        [f"p{n // 4}" for n in range(count)],
        normal,
    )


FAST: dict[str, Any] = {"lr": 3e-2, "epochs": 60, "batch_size": 64}


def test_the_probe_finds_the_direction_from_safe_to_unsafe() -> None:
    features, unsafe, groups, normal = separable()
    probe = train_probe(features, unsafe, groups, **FAST)
    assert probe.accuracy == 1.0
    assert probe.balanced_accuracy == 1.0
    assert torch.equal(probe.predict(features), unsafe)
    assert torch.cosine_similarity(probe.direction, normal, dim=0) > 0.95
    torch.testing.assert_close(probe.direction, probe.weight[1] - probe.weight[0])
    assert probe.curve[0].train_loss > probe.curve[-1].train_loss


def test_features_that_tell_nothing_give_no_more_than_the_majority() -> None:
    generator = torch.Generator().manual_seed(1)
    unsafe = torch.rand(600, generator=generator) < 0.8
    probe = train_probe(torch.zeros(600, 3), unsafe, range(600), **FAST)
    assert probe.accuracy == probe.majority
    assert 0.7 < probe.majority < 0.9
    assert probe.balanced_accuracy == 0.5
    assert not probe.direction.any(), "nothing of a random start may stay in the direction"


def test_balancing_lets_the_rare_class_count_as_much() -> None:
    generator = torch.Generator().manual_seed(2)
    unsafe = torch.rand(1000, generator=generator) < 0.1
    features = torch.randn(1000, 2, generator=generator) + unsafe[:, None] * 1.0
    plain, balanced = (train_probe(features, unsafe, range(1000), balanced=flag, **FAST) for flag in (False, True))
    assert balanced.balanced_accuracy > plain.balanced_accuracy + 0.1


def test_no_prompt_is_in_training_and_validation() -> None:
    groups = [f"p{number % 13}" for number in range(200)]
    held_out = probing._held_out(groups, 0.3, seed=5)
    inside = {group for group, held in zip(groups, held_out, strict=True) if held}
    outside = {group for group, held in zip(groups, held_out, strict=True) if not held}
    assert not inside & outside
    assert len(inside) == round(0.3 * 13)
    assert not torch.equal(held_out, probing._held_out(groups, 0.3, seed=6))


def test_responses_learned_by_heart_do_not_count_as_accuracy() -> None:
    """One-hot features of the prompt, one label to a prompt: perfect in training, no help on unseen prompts."""
    groups = [number // 4 for number in range(240)]
    features = torch.nn.functional.one_hot(torch.tensor(groups)).float()
    unsafe = torch.tensor([group % 2 == 1 for group in groups])
    probe = train_probe(features, unsafe, groups, **FAST)
    assert probe.curve[-1].train_loss < 0.5
    assert probe.accuracy < 0.75


def test_best_keeps_the_epoch_of_the_lowest_validation_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(60, 50, generator=generator)
    unsafe = (features[:, 0] + torch.randn(60, generator=generator)) > 0
    last, best = (train_probe(features, unsafe, range(60), keep=keep, **FAST) for keep in ("last", "best"))
    assert last.epoch == len(last.curve) == FAST["epochs"]
    losses = [epoch.validation_loss for epoch in best.curve]
    assert losses[best.epoch - 1] == min(losses)
    assert best.epoch < last.epoch


def test_a_seed_decides_the_probe() -> None:
    features, unsafe, groups, _ = separable(80)
    first, again, other = (train_probe(features, unsafe, groups, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    features, unsafe, groups, _ = separable(80)
    probe = train_probe(features, unsafe, groups, epochs=3, metadata={"data": "generated"})
    probe.save(tmp_path / "probe.safetensors")
    assert torch.equal(Probe.load(tmp_path).weight, probe.weight)  # the folder of `shapo probe`
    loaded = Probe.load(tmp_path / "probe.safetensors")
    assert torch.equal(loaded.weight, probe.weight)
    assert torch.equal(loaded.bias, probe.bias)
    for name in ("accuracy", "majority", "balanced_accuracy", "epoch", "curve", "metadata"):
        assert getattr(loaded, name) == getattr(probe, name)
    assert loaded.metadata["data"] == "generated"
    assert loaded.metadata["train"] == "64"


def write_other(path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, path)


def write_damaged(path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, path, metadata={"format": "shapo-probe", "record": "{"})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot read the probe .*No such file"),
        (lambda path: path.write_bytes(b"no"), "is a damaged probe file"),
        (write_other, "is no probe; write one with `shapo probe`"),
        (write_damaged, "is a damaged probe file"),
    ],
    ids=["missing", "garbage", "other", "damaged"],
)
def test_a_file_that_is_no_probe_gives_one_clear_line(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "probe.safetensors")
    with pytest.raises(UserError, match=message):
        Probe.load(tmp_path / "probe.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "learning rate is 0.0"),
        ({"lr": float("nan")}, "learning rate is nan"),
        ({"epochs": 0}, "0 epochs"),
        ({"validation": 1.0}, "validation share is 1.0"),
        ({"keep": "first"}, "keep is 'first'; expected last or best"),
        ({"groups": ["p"] * 80}, "1 different prompts; it needs two or more"),
        ({"unsafe": torch.ones(80, dtype=torch.bool)}, "are all unsafe; it needs both"),
    ],
)
def test_a_probe_that_cannot_be_trained_is_refused(changes: dict[str, Any], message: str) -> None:
    features, unsafe, groups, _ = separable(80)
    with pytest.raises(UserError, match=message):
        train_probe(**{"features": features, "unsafe": unsafe, "groups": groups} | changes)


def test_lengths_that_differ_are_a_programming_error() -> None:
    features, unsafe, groups, _ = separable(80)
    with pytest.raises(ValueError, match="80 labels, 79 groups"):
        train_probe(features, unsafe, groups[1:])


def test_the_default_recipe_reaches_the_minimum_and_the_published_one_stops_far_from_it():
    generator = torch.Generator().manual_seed(0)
    unsafe = [index % 2 == 0 for index in range(200)]
    signs = torch.tensor([1.0 if label else -1.0 for label in unsafe])
    features = torch.randn(200, 16, generator=generator)
    features[:, 0] += 0.5 * signs
    groups = list(range(200))
    trained = train_probe(features, unsafe, groups, progress=False)
    long = train_probe(features, unsafe, groups, lr=0.02, epochs=3000, progress=False)
    short = train_probe(features, unsafe, groups, progress=False, **probing.PUBLISHED)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(trained.direction, long.direction, dim=0) > 0.99
    assert (short.direction.norm() / long.direction.norm()) < 0.01


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, record: tensors.update(weight=torch.zeros(3, 4)),
        lambda tensors, record: tensors.update(weight=torch.full((2, 4), torch.nan)),
        lambda tensors, record: tensors.update(weight=torch.zeros(2, 4, dtype=torch.int64)),
        lambda tensors, record: tensors.pop("bias"),
        lambda tensors, record: record.update(accuracy="high"),
        lambda tensors, record: record.update(curve=[3]),
        lambda tensors, record: record.pop("epoch"),
    ],
)
def test_a_damaged_probe_file_gives_one_line(change: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}
    record = {"accuracy": 0.5, "majority": 0.5, "balanced_accuracy": 0.5, "epoch": 1, "curve": [], "metadata": {}}
    path = tmp_path / "probe.safetensors"

    def write() -> None:
        save_file(tensors, path, metadata={"format": "shapo-probe", "version": "1", "record": json.dumps(record)})

    write()
    Probe.load(path)
    change(tensors, record)
    write()
    with pytest.raises(UserError, match="damaged probe file"):
        Probe.load(path)
