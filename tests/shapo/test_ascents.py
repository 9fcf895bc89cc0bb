"""What ascents look at and how far they go: drawn rows and radii, and the loop that follows them."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shapo_kernels as sk
from shapo.ascents import AscentPart, RhoSchedule
from shapo.config import LoopConfig, LossConfig, ShaPOConfig
from shapo.data.formats import load_pairs
from shapo.errors import UserError
from shapo.scoring.logps import TokenizedPairs, batch_logps, compute_logps
from shapo.training.metrics import read_metrics
from shapo.training.preference import train_preferences

NEURONS = {f"model.layers.{layer}.mlp.down_proj.weight": list(range(0, 64, 7)) for layer in range(2)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 5), st.integers(0, 9))
def test_a_number_of_pairs_is_drawn_from_as_few_micro_batches_as_hold_them(sizes, pairs, seed, update):
    drawn = AscentPart(pairs=pairs, seed=seed).draw(sizes, update)
    assert sum(map(len, drawn)) == min(pairs, sum(sizes))
    for rows, size in zip(drawn, sizes, strict=True):
        assert rows == sorted(set(rows))
        assert set(rows) <= set(range(size))
    assert sum(0 < len(rows) < size for rows, size in zip(drawn, sizes, strict=True)) <= 1
    assert drawn == AscentPart(pairs=pairs, seed=seed).draw(sizes, update)


@pytest.mark.parametrize(
    ("fraction", "pairs", "expected"), [(0.1, 30, 3), (0.25, 16, 4), (0.25, 3, 1), (0.7, 10, 7), (1.0, 5, 5)]
)
def test_a_share_is_rounded_up_and_not_by_the_last_bit_of_a_float(fraction, pairs, expected):
    assert len(AscentPart(fraction).draw([pairs], 0)[0]) == expected


@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2]])
def test_every_pair_is_drawn_equally_often(sizes):
    part, counts = AscentPart(0.25, seed=3), Counter()
    for update in range(2000):
        counts.update((number, row) for number, rows in enumerate(part.draw(sizes, update)) for row in rows)
    assert len(counts) == 8
    assert all(abs(count - 500) < 5 * (500 * 0.75) ** 0.5 for count in counts.values())


def test_other_seeds_updates_and_micro_batches_draw_other_pairs():
    rows = {
        tuple(AscentPart(0.25, seed=seed).draw([32], update, micro)[0])
        for seed, update, micro in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(rows) == 4


def test_a_schedule_is_plain_then_rises_then_stays():
    assert [RhoSchedule(0.4, 2, 4).at(t) for t in range(8)] == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert [RhoSchedule(0.4, 2).at(t) for t in range(4)] == [0, 0, 0.4, 0.4]
    assert RhoSchedule((1.0, 2.0), 1, 2).at(1) == (0.5, 1.0)
    assert [RhoSchedule(0.4, 2, 4).ends_at(), RhoSchedule(0.4, 2).ends_at(), RhoSchedule(0.4).ends_at()] == [5, 2, 0]


@pytest.fixture
def pairs(synthetic_rows, tiny_encoder):
    return TokenizedPairs(load_pairs(synthetic_rows["train"][:12]), tiny_encoder)


def train(model, pairs, folder, shapo, **loop):
    loop = {"updates": 1, "batch_size": 6, "lr": 1e-3, "warmup": 0, **loop}
    return train_preferences(
        model,
        pairs,
        loss=LossConfig(),
        loop=LoopConfig(**loop),
        shapo=shapo,
        subspace=sk.Subspace(NEURONS),
        output=folder,
        progress=False,
    )


def rows_of_training_passes(model):
    """Sizes of the forward passes that carry a gradient."""
    rows = []
    model.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output.logits)) if torch.is_grad_enabled() else None
    )
    return rows


@pytest.mark.parametrize(
    ("options", "loop", "expected"),
    [
        ({"ascent_pairs": 1}, {}, [2, 12]),
        ({"ascent_pairs": 2}, {"micro_batch_size": 2}, [4, 4, 4, 4]),
        ({"ascent_fraction": 0.5}, {"micro_batch_size": 2}, None),
        ({"per_micro_batch": True}, {"micro_batch_size": 2}, [4] * 6),
        ({"per_micro_batch": True, "ascent_pairs": 1}, {"micro_batch_size": 3}, [2, 6, 2, 6]),
    ],
)
def test_an_ascent_costs_the_passes_of_the_pairs_that_it_looks_at(options, loop, expected, tiny_llama, pairs, tmp_path):
    rows = rows_of_training_passes(tiny_llama)
    train(tiny_llama, pairs, tmp_path, ShaPOConfig(rho=0.1, **options), **loop)
    if expected is None:  # 3 of 6 pairs are a micro-batch and half of one, in either order
        assert sorted(rows[:2]) == [2, 4]
        assert rows[2:] == [4, 4, 4]
    else:
        assert rows == expected


def test_the_gap_is_of_the_pairs_that_ascended(tiny_llama, pairs, tmp_path):
    start = copy.deepcopy(tiny_llama)
    subspace, seen = sk.Subspace(NEURONS), []
    hook = tiny_llama.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs) if torch.is_grad_enabled() else None, with_kwargs=True
    )
    train(tiny_llama, pairs, tmp_path, ShaPOConfig(rho=0.5, ascent_pairs=2), optimizer="sgd")
    hook.remove()
    (line,) = read_metrics(tmp_path / "metrics.jsonl", "update")
    tokens, mask = seen[0]["input_ids"], seen[0]["attention_mask"].bool()
    ascended = {tuple(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)}
    indices = [i for i in range(len(pairs)) if tuple(pairs.chosen[i].input_ids) in ascended]
    assert len(indices) == 2
    reference = compute_logps(start, pairs, progress=False)[indices]
    opt = sk.ShaPOOptimizer(torch.optim.SGD(start.parameters()), start, subspace, rho=0.5)

    def loss():
        policy = batch_logps(start, pairs.batch(indices, torch.device("cpu")))
        return sk.losses.dpo(policy.chosen, policy.rejected, reference.chosen, reference.rejected, beta=0.1).mean()

    with opt.ascent():
        opt.ascend(loss())
    with opt.perturbed(), torch.no_grad():
        moved = loss().item()
    assert line["ascent_loss"] == pytest.approx(loss().item(), abs=1e-6)
    assert line["gap"] == pytest.approx(moved - loss().item(), rel=1e-3)
    assert line["gap"] > 1e-4


def test_a_perturbation_for_each_micro_batch_equals_the_optimizer_driven_by_hand(tiny_llama, pairs, tmp_path):
    start = copy.deepcopy(tiny_llama)
    loop = {"updates": 2, "batch_size": 5, "micro_batch_size": 2, "lr": 0.1, "optimizer": "sgd", "clip": 0.0}
    train(tiny_llama, pairs, tmp_path, ShaPOConfig(rho=0.5, per_micro_batch=True), **loop)
    from shapo.training.order import DataOrder, split

    reference = compute_logps(start, pairs, progress=False)
    opt = sk.ShaPOOptimizer(torch.optim.SGD(start.parameters(), lr=0.1), start, sk.Subspace(NEURONS), rho=0.5)
    start.train()
    order = DataOrder(len(pairs), 5, 0)
    for update in range(2):
        batch = order.batch(update)
        for micro in split(batch, 2):

            def loss(micro=micro):
                policy, ref = batch_logps(start, pairs.batch(micro, torch.device("cpu"))), reference[micro]
                return sk.losses.dpo(policy.chosen, policy.rejected, ref.chosen, ref.rejected, beta=0.1).mean()

            with opt.ascent():
                opt.ascend(loss())
            with opt.perturbed():
                (loss() * len(micro) / len(batch)).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(tiny_llama.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_a_loop_follows_the_schedule_of_the_radius(tiny_llama, pairs, tmp_path):
    shapo = ShaPOConfig(rho=0.3, relative=True, plain_updates=1, rho_warmup=3)
    train(tiny_llama, pairs, tmp_path, shapo, updates=6, lr=1e-6)
    lines = read_metrics(tmp_path / "metrics.jsonl", "update")
    radii = [line["shapo"]["relative_radius"] if "shapo" in line else 0.0 for line in lines]
    assert radii == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3, 0.3], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "loop", "loss", "message"),
    [
        ({"ascent_pairs": 7}, {}, LossConfig(), "ascent_pairs is 7, but an ascent is over 6 pairs"),
        (
            {"ascent_pairs": 3, "per_micro_batch": True},
            {"micro_batch_size": 2},
            LossConfig(),
            "ascent_pairs is 3, but an ascent is over 2 pairs",
        ),
        (
            {"per_micro_batch": True},
            {"micro_batch_size": 2},
            LossConfig(aggregation="drdpo"),
            "drdpo is over the whole",
        ),
    ],
)
def test_impossible_ascents_are_refused_before_anything_is_written(
    options, loop, loss, message, tiny_llama, pairs, tmp_path
):
    with pytest.raises(UserError, match=message):
        train_preferences(
            tiny_llama,
            pairs,
            loss=loss,
            loop=LoopConfig(batch_size=6, **loop),
            shapo=ShaPOConfig(rho=0.1, **options),
            subspace=sk.Subspace(NEURONS),
            output=tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AscentPart(0.5, 3), "two ways to say one thing"),
        (lambda: AscentPart(float("nan")), "ascent_fraction is nan"),
        (lambda: AscentPart(pairs=0), "ascent_pairs is 0"),
        (lambda: RhoSchedule(0.1, -1), "plain_updates is -1"),
        (lambda: RhoSchedule(0.1, 0, -1), "rho_warmup is -1"),
    ],
)
def test_impossible_parts_and_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_smallest_share_is_of_one_pair():
    assert [len(drawn) for drawn in AscentPart(1e-300, None, 0).draw([4], 0)] == [1]
