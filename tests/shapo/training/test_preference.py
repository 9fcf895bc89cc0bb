"""The preference loop: every combination runs, passes are counted, micro-batches change nothing, metrics say what
happened.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from shapo.config import AGGREGATIONS, LOSSES, LoopConfig, LossConfig, ShaPOConfig
from shapo.data.formats import load_pairs
from shapo.data.noise import flip_labels
from shapo.errors import UserError
from shapo.scoring.logps import TokenizedPairs
from shapo.scoring.rewards import PairRewards
from shapo.training import update
from shapo.training.metrics import MetricsLog, read_metrics
from shapo.training.preference import train_preferences
from shapo.training.sft import train_sft
from shapo.training.update import Pass
from shapo_kernels import Subspace, losses
from shapo_kernels.ops import linear_tiles

NEURONS = {f"model.layers.{layer}.mlp.down_proj.weight": list(range(0, 64, 7)) for layer in range(2)}


@pytest.fixture
def pairs(synthetic_rows, tiny_encoder):
    return TokenizedPairs(flip_labels(load_pairs(synthetic_rows["train"][:12]), 0.25, seed=0), tiny_encoder)


@pytest.fixture
def rewards(pairs):
    generator = torch.Generator().manual_seed(0)
    return PairRewards(torch.randn(len(pairs), generator=generator), torch.randn(len(pairs), generator=generator))


def train(model, pairs, folder, *, loop=None, loss=None, shapo=None, subspace=None, **options):
    loop = loop or LoopConfig(updates=1, batch_size=6, lr=1e-3, warmup=0)
    if subspace is None and shapo:
        subspace = Subspace(NEURONS)
    return train_preferences(
        model,
        pairs,
        loss=loss or LossConfig(),
        loop=loop,
        shapo=shapo,
        subspace=subspace,
        output=folder,
        progress=False,
        **options,
    )


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_loss_names_are_those_of_the_kernel_library():
    assert set(LOSSES) == set(losses.PAIRWISE)
    assert set(AGGREGATIONS) == set(losses.AGGREGATIONS)
    for name in LOSSES:
        assert LossConfig(name).uses_reference == losses.PAIRWISE[name].uses_reference
        assert LossConfig(name).uses_rewards == losses.PAIRWISE[name].uses_rewards


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shapo", [None, ShaPOConfig(rho=0.1)], ids=["plain", "shapo"])
def test_a_trained_head_is_walked_by_pairs_and_trains_as_by_sums(
    shapo, aggregation, tiny_llama, pairs, rewards, tmp_path, monkeypatch
):
    """Micro-batches of several pairs, of which a tile holds one; the numbers that are logged are the same too."""
    # Each pair's logits fit, in float64, and those of a micro-batch of several do not.
    room = 8 * tiny_llama.config.vocab_size * max(pairs.response_tokens(range(len(pairs))))
    monkeypatch.setattr(linear_tiles, "default_chunk_bytes", lambda device: room)
    parts, walk = [], losses.linear_preference_loss

    def watched(hidden, weight, labels, share, **options):
        def seen(sums, *more):
            parts.append(len(sums) // 2)
            return share(sums, *more)

        return walk(hidden, weight, labels, seen, **options)

    monkeypatch.setattr(losses, "linear_preference_loss", watched)
    loss = LossConfig("reward_level", aggregation=aggregation, nll=0.1)
    loop = LoopConfig(updates=2, batch_size=7, micro_batch_size=4, lr=1e-3, warmup=0)

    def trained(folder):
        model = copy.deepcopy(tiny_llama).double()
        train(model, pairs, folder, loss=loss, loop=loop, shapo=shapo, rewards=rewards)
        lines = read_metrics(folder / "metrics.jsonl", "update")
        return state_of(model), torch.tensor([[x[n] for n in ("loss", "accuracy", "margin", "nll")] for x in lines])

    by_pairs, numbers = trained(tmp_path / "pairs")
    assert sum(parts) == 11  # of 12: the last micro-batch is one pair
    assert max(parts) < 4
    monkeypatch.setattr(update, "usable_by_pairs", lambda *_, **__: False)
    by_sums, expected = trained(tmp_path / "sums")
    assert sum(parts) == 11
    torch.testing.assert_close(numbers, expected, rtol=1e-6, atol=1e-9)
    for name, value in by_pairs.items():
        torch.testing.assert_close(value, by_sums[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_micro_batch_whose_logits_fit_one_tile_is_not_walked_by_pairs(tiny_llama, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "linear_preference_loss", None)
    loop = LoopConfig(updates=1, batch_size=4, micro_batch_size=4, lr=1e-3, warmup=0)
    train(copy.deepcopy(tiny_llama), pairs, tmp_path, loss=LossConfig("dpo"), loop=loop)


@pytest.mark.parametrize("shapo", [None, ShaPOConfig(rho=0.1)], ids=["plain", "shapo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_with_every_aggregation_plain_and_shapo(
    name, aggregation, shapo, tiny_llama, pairs, rewards, tmp_path
):
    before = state_of(tiny_llama)
    train(
        tiny_llama,
        pairs,
        tmp_path,
        loss=LossConfig(name, aggregation=aggregation),
        shapo=shapo,
        rewards=rewards if name == "reward_level" else None,
    )
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "update")
    assert math.isfinite(line["loss"])
    assert ("shapo" in line) == (shapo is not None)
    assert any(not torch.equal(value, before[key]) for key, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize("ascent", ["selective", "grad"])
@pytest.mark.parametrize("perturbation", ["in_place", "delta"])
def test_ways_to_perturb_and_to_ascend_agree(ascent, perturbation, tiny_llama, pairs, tmp_path):
    start = state_of(tiny_llama)
    loop = LoopConfig(updates=2, batch_size=6, lr=1e-2, warmup=0, optimizer="sgd")
    ends = []
    for number, config in enumerate(
        [ShaPOConfig(rho=0.3), ShaPOConfig(rho=0.3, ascent=ascent, perturbation=perturbation)]
    ):
        tiny_llama.load_state_dict(start)
        train(tiny_llama, pairs, tmp_path / str(number), loop=loop, shapo=config)
        ends.append(state_of(tiny_llama))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(aggregation="drdpo", beta_prime=0.5),
        LossConfig(nll=0.5),
        LossConfig(aggregation="drdpo", nll=0.5),
    ],
    ids=["mean", "drdpo", "mean-nll", "drdpo-nll"],
)
@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_equal_the_whole_batch(loss, size, tiny_llama, pairs, tmp_path):
    start = state_of(tiny_llama)
    ends = []
    for micro in (None, size):
        tiny_llama.load_state_dict(start)
        loop = LoopConfig(updates=2, batch_size=10, micro_batch_size=micro, lr=0.1, warmup=0, optimizer="sgd")
        train(tiny_llama, pairs, tmp_path / str(micro), loop=loop, loss=loss, shapo=ShaPOConfig(rho=0.3))
        ends.append(state_of(tiny_llama))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=2e-6)
    whole, parts = (read_metrics(tmp_path / str(micro) / "metrics.jsonl", "update") for micro in (None, size))
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["gap"] == pytest.approx(one["gap"], rel=1e-2)


def test_the_likelihood_term_is_the_cross_entropy_of_the_chosen_responses(tiny_llama, pairs, tmp_path):
    batch = pairs.batch(range(len(pairs)), torch.device("cpu"))
    chosen = {name: value[: len(pairs)] for name, value in batch.items()}
    with torch.no_grad():
        expected = tiny_llama.eval()(**chosen).loss.item()
    loop = LoopConfig(updates=1, batch_size=len(pairs), micro_batch_size=5, lr=1e-3, warmup=0)
    for name, shapo in (("plain", None), ("shapo", ShaPOConfig(rho=0.1))):
        model = copy.deepcopy(tiny_llama)
        train(model, pairs, tmp_path / name, loop=loop, loss=LossConfig(nll=0.5), shapo=shapo)
        (row,) = read_metrics(tmp_path / name / "metrics.jsonl", "update")
        assert row["nll"] == pytest.approx(expected, rel=1e-5)
        # The policy still is its reference, so DPO's loss is log 2.
        assert row["ascent_loss" if shapo else "loss"] == pytest.approx(math.log(2) + 0.5 * expected, rel=1e-5)


def test_the_reference_is_asked_once_for_each_response_and_not_at_all_from_the_cache(tiny_llama, pairs, tmp_path):
    start, asked = state_of(tiny_llama), []
    hook = tiny_llama.register_forward_hook(
        lambda module, inputs, output: asked.append(0 if torch.is_grad_enabled() else len(output.logits))
    )
    loop = LoopConfig(updates=3, batch_size=6, lr=1e-3, warmup=0)
    for rows in (2 * len(pairs), 0):
        asked.clear()
        tiny_llama.load_state_dict(start)
        clean = TokenizedPairs(list(pairs.pairs), pairs._encoder)
        clean.flipped[:] = False
        train(tiny_llama, clean, tmp_path, loop=loop, shapo=ShaPOConfig(rho=0.1))
        assert sum(asked) == rows
    hook.remove()


def test_a_shapo_update_costs_two_forward_passes_and_a_plain_one_costs_one(tiny_llama, pairs, tmp_path):
    passes = []
    hook = tiny_llama.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    loop = LoopConfig(updates=7, batch_size=6, lr=1e-3, warmup=0)
    train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=0.1, interval=2, plain_updates=3))
    hook.remove()
    due = ["shapo" in line for line in read_metrics(tmp_path / "metrics.jsonl", "update")]
    assert due == [False, False, False, True, False, True, False]
    assert sum(passes) == 7 + 2


def test_both_passes_of_an_update_see_the_same_dropout(tiny_llama, pairs, tmp_path):
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    loop = LoopConfig(updates=1, batch_size=6, lr=1e-3, warmup=0, dropout=True)
    train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=1e-5))
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "update")
    assert abs(line["gap"]) < 1e-4  # other masks would make it some hundredths
    assert line["ascent_loss"] != pytest.approx(
        math.log(2), abs=1e-6
    )  # dropout is on, so the policy is not the reference


def test_gradients_are_clipped_once_and_in_the_second_pass(tiny_llama, pairs, tmp_path):
    before = state_of(tiny_llama)
    loop = LoopConfig(updates=1, batch_size=6, lr=1.0, warmup=0, optimizer="sgd", clip=1e-3)
    train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=0.1))
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "update")
    moved = sum((value - before[name]).double().square().sum() for name, value in tiny_llama.named_parameters())
    assert line["grad_norm"] > 1e-2
    assert moved.sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_logged_radius_is_the_one_asked_for(tiny_llama, pairs, tmp_path):
    summary = train(tiny_llama, pairs, tmp_path, shapo=ShaPOConfig(rho=0.25, relative=True))
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "update")
    selected = [
        tiny_llama.get_parameter(name)[:, index] for name, index in NEURONS.items()
    ]  # one update with lr 1e-3 later, so to that accuracy
    norm = math.sqrt(sum(value.detach().square().sum().item() for value in selected))
    assert line["shapo"]["epsilon_norm"] == pytest.approx(0.25 * norm, rel=2e-2)
    assert summary["rho_over_weight_norm"] == pytest.approx(0.25, rel=1e-5)


def test_bfloat16_autocast_keeps_the_direction_of_the_perturbation(tiny_llama, pairs, tmp_path):
    loop = LoopConfig(updates=2, batch_size=6, lr=1e-3, warmup=0, bf16=True)
    train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=1e-3))
    for line in read_metrics(tmp_path / "metrics.jsonl", "update"):
        assert line["shapo"]["realised_cosine"] > 0.99


def test_an_ascent_on_a_part_of_the_batch_sees_that_part_alone(tiny_llama, pairs, tmp_path):
    rows = []
    hook = tiny_llama.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output.logits)) if torch.is_grad_enabled() else None
    )
    train(tiny_llama, pairs, tmp_path, shapo=ShaPOConfig(rho=0.1, ascent_fraction=0.5))
    hook.remove()
    assert rows == [6, 12]


def test_training_leaves_no_hooks_behind(tiny_llama, pairs, tmp_path):
    train(tiny_llama, pairs, tmp_path, shapo=ShaPOConfig(rho=0.1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())


def test_evaluation_lines_tell_accuracy_and_memorised_flips_before_between_and_after(
    tiny_llama, pairs, synthetic_rows, tiny_encoder, tmp_path
):
    clean = TokenizedPairs(load_pairs(synthetic_rows["test"][:8]), tiny_encoder)
    loop = LoopConfig(updates=5, batch_size=6, lr=1e-2, warmup=0, eval_every=2)
    summary = train(tiny_llama, pairs, tmp_path, loop=loop, evaluation=clean)
    lines = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert [line["update"] for line in lines] == [0, 2, 4, 5]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    assert all(line["accuracy"]["n"] == 8 and line["flips_fitted"]["n"] == 3 for line in lines)
    assert summary["flipped"] == 3
    assert summary["final"]["accuracy"] == lines[-1]["accuracy"]["value"]


def test_before_the_first_update_every_pair_is_a_tie_however_the_model_is_asked(
    tiny_llama, pairs, synthetic_rows, tiny_encoder, tmp_path
):
    clean = TokenizedPairs(load_pairs(synthetic_rows["test"]), tiny_encoder)
    loop = LoopConfig(updates=1, batch_size=6, micro_batch_size=1, lr=1e-3, warmup=0)
    everything = {"shapo": ShaPOConfig(rho=0.1), "subspace": Subspace.full(tiny_llama)}  # the head's logits are made
    train(tiny_llama, pairs, tmp_path, loop=loop, evaluation=clean, **everything)
    before, after = read_metrics(tmp_path / "metrics.jsonl", "evaluation")
    assert (before["ties"], before["margin"]) == (len(clean), 0)
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-15)
    assert before["accuracy"]["value"] == before["flips_fitted"]["value"] == 0.5
    assert after["ties"] == 0


def test_partial_batches_are_kept(tiny_llama, pairs, tmp_path):
    summary = train(tiny_llama, pairs, tmp_path, loop=LoopConfig(epochs=2, batch_size=5, lr=1e-4))
    assert summary["updates"] == 2 * 3


def test_no_dropout_acts_unless_it_is_asked_for(tiny_llama, pairs, tmp_path):
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    train(tiny_llama, pairs, tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "update")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6), "the policy is its reference"


def test_the_model_is_saved_before_anything_else_can_fail(tiny_llama, pairs, tmp_path, monkeypatch):
    before, saved = state_of(tiny_llama), []

    def full(self, kind, values):
        raise UserError("cannot write metrics.jsonl: No space left on device")

    def save(_):
        saved.append(state_of(tiny_llama))
        monkeypatch.setattr(MetricsLog, "write", full)

    loop = LoopConfig(updates=2, batch_size=6, lr=1e-3, warmup=0)
    with pytest.raises(UserError, match="No space left"):
        train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=0.1), save=save)
    assert len(saved) == 1
    assert all(torch.equal(value, saved[0][name]) for name, value in tiny_llama.state_dict().items())
    assert not torch.equal(saved[0]["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize("damage", ["a cut line", "no file"])
def test_metrics_that_were_damaged_meanwhile_lose_no_model(damage, tiny_llama, pairs, tmp_path):
    saved = []

    def save(_):
        saved.append(True)
        path = tmp_path / "metrics.jsonl"
        path.unlink() if damage == "no file" else path.write_text('{"kind": "upd\n')

    loop = LoopConfig(updates=2, batch_size=6, warmup=0)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        train(tiny_llama, pairs, tmp_path, loop=loop, save=save)
    assert saved == [True]


def test_weights_that_are_not_finite_are_not_saved(tiny_llama, pairs, tmp_path, tiny_encoder):
    saved, huge = [], LoopConfig(updates=1, batch_size=6, lr=1e38, optimizer="sgd", clip=0, warmup=0)
    with pytest.raises(UserError, match="training has diverged"):
        train(tiny_llama, pairs, tmp_path / "train", loop=huge, save=lambda _: saved.append(True))
    examples = [(pair.prompt, pair.chosen) for pair in pairs.pairs]
    for lr in (1e38, 1e30):
        config = LoopConfig(updates=3, batch_size=6, lr=lr, optimizer="sgd", clip=0, warmup=0)
        with pytest.raises(UserError, match="training has diverged"):
            train_sft(
                tiny_llama,
                tiny_encoder,
                examples,
                config=config,
                output=tmp_path / f"{lr}",
                progress=False,
                save=lambda _: saved.append(True),
            )
    assert not saved


@pytest.mark.parametrize("options", [{"interval": 3}, {"plain_updates": 2}, {"interval": 1000}], ids=str)
def test_a_shapo_run_without_a_shapo_update_is_refused(options, tiny_llama, pairs, tmp_path):
    loop = LoopConfig(updates=2, batch_size=6, warmup=0)
    with pytest.raises(UserError, match="of 2 updates none would be a ShaPO update"):
        train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=0.1, **options))
    with pytest.raises(UserError, match="the subspace selects no neuron"):
        train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=0.1), subspace=Subspace({}))
    assert not list(tmp_path.iterdir())


def test_a_radius_that_is_never_reached_is_told(tiny_llama, pairs, tmp_path, capsys):
    loop = LoopConfig(updates=2, batch_size=6, warmup=0)
    train(tiny_llama, pairs, tmp_path, loop=loop, shapo=ShaPOConfig(rho=0.1, rho_warmup=9))
    assert "rho is reached after 9 updates, and the last ShaPO update is number 2" in capsys.readouterr().err


def test_a_model_of_nan_is_not_blamed_on_the_learning_rate(tiny_llama, pairs, tmp_path):
    with torch.no_grad():
        tiny_llama.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the model's log-probabilities of 12 of 12 pairs are NaN"):
        train(tiny_llama, pairs, tmp_path)
    labelled_right = pairs.subset([number for number in range(len(pairs)) if not pairs.flipped[number]])
    with pytest.raises(UserError, match="the first loss is nan, before any update: look at the model's weights"):
        train(tiny_llama, labelled_right, tmp_path, loss=LossConfig("simpo"))


def test_a_loss_that_is_not_finite_later_ends_the_run_with_one_line(tiny_llama, pairs, tmp_path):
    with pytest.raises(UserError, match="the loss is nan: training has diverged; lower the learning rate or rho"):
        train(tiny_llama, pairs, tmp_path, loop=LoopConfig(updates=3, batch_size=6, lr=1e30, warmup=0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShaPOConfig(rho=0.0), "rho is 0.0"),
        (lambda: ShaPOConfig(rho=-1.0), "rho is -1.0"),
        (lambda: ShaPOConfig(rho=float("nan")), "rho is nan"),
        (lambda: ShaPOConfig(rho=(1.0, 2.0)), "needs the norm none"),
        (lambda: ShaPOConfig(rho=0.1, interval=0), "interval is 0"),
        (lambda: ShaPOConfig(rho=0.1, ascent_fraction=0.0), "ascent_fraction is 0.0"),
        (lambda: ShaPOConfig(rho=0.1, relative=True, norm="none"), "relative rho"),
        (lambda: LossConfig("nope"), "unknown loss"),
        (lambda: LossConfig("dpo", epsilon=0.1), "epsilon is an option of cdpo and rdpo"),
        (lambda: LossConfig("cdpo", epsilon=0.5), "epsilon is 0.5"),
        (lambda: LossConfig("dpo", gamma=1.0), "gamma is an option of simpo"),
        (lambda: LossConfig("dpo", beta_prime=1.0), "beta_prime is an option of drdpo, not of mean"),
        (lambda: LossConfig("dpo", beta=0.0), "beta is 0.0"),
        (lambda: LoopConfig(updates=0), "number of updates is 0"),
        (lambda: LoopConfig(micro_batch_size=0), "micro-batch size is 0"),
        (lambda: LoopConfig(lr=float("inf")), "learning rate is inf"),
        (lambda: LoopConfig(clip=-1.0), "clip is -1.0"),
        (lambda: LoopConfig(optimizer="adamm"), "unknown optimizer"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_options_that_do_not_belong_together_are_refused(tiny_llama, pairs, rewards, tmp_path):
    with pytest.raises(UserError, match="no other loss takes any"):
        train(tiny_llama, pairs, tmp_path, rewards=rewards)
    with pytest.raises(UserError, match="needs rewards"):
        train(tiny_llama, pairs, tmp_path, loss=LossConfig("reward_level"))
    with pytest.raises(UserError, match="both a radius and a subspace"):
        train(tiny_llama, pairs, tmp_path, subspace=Subspace(NEURONS))


def test_a_tie_counts_half_in_an_updates_accuracy():
    seen = Pass(margins=[torch.tensor([0.0, 0.0, 2.0]), torch.tensor([-1.0, 0.0])])
    assert seen.accuracy_and_margin() == {"accuracy": pytest.approx(2.5 / 5), "margin": pytest.approx(0.2)}


@pytest.mark.parametrize(
    ("name", "indifferent"),
    [
        ("dpo", math.log(2)),
        ("cdpo", math.log(2)),
        ("rdpo", math.log(2)),
        ("ipo", 1 / (2 * 0.5) ** 2),
        ("ipo_mean", 1 / (2 * 0.5) ** 2),
        ("simpo", math.log(1 + math.exp(0.5))),  # softplus of the target margin
        ("hinge", 1.0),
        ("reward_level", math.log(2)),  # whatever the soft labels are
    ],
)
def test_a_broken_models_gap_is_measured_by_its_own_loss(
    name, indifferent, tiny_llama, pairs, rewards, tmp_path, capsys
):
    given = {"rewards": rewards} if name == "reward_level" else {}
    config = LossConfig(name, beta=0.5)
    train(
        tiny_llama,
        pairs,
        tmp_path,
        loss=config,
        shapo=ShaPOConfig(rho=1e4),
        subspace=Subspace.full(tiny_llama),
        **given,
    )
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "update")
    assert line["gap"] > 10 * indifferent
    assert f"a model that prefers nothing has {indifferent:.3g}:" in capsys.readouterr().err
