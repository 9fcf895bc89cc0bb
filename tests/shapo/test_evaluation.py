"""Accuracy with its interval, loss, margins, memorised flips."""

from __future__ import annotations

import math

import pytest
import torch

from shapo.data.pairs import PreferencePair
from shapo.evaluation import flips_fitted, log_ratios, preference_metrics
from shapo.scoring.logps import PairLogps


def logps(chosen, rejected, chosen_tokens=None, rejected_tokens=None):
    ones = [1] * len(chosen)
    return PairLogps(
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.tensor(chosen_tokens or ones),
        torch.tensor(rejected_tokens or ones),
    )


PAIRS = [PreferencePair("p", "a", "b", category=name) for name in ("x", "x", "y", "y")]
POLICY = logps([-1.0, -4.0, -2.0, -3.0], [-3.0, -2.0, -2.0, -9.0])
REFERENCE = logps([-2.0, -3.0, -2.0, -5.0], [-2.0, -3.0, -2.0, -5.0])


def test_accuracy_loss_and_margin_follow_their_definitions():
    metrics = preference_metrics(POLICY, REFERENCE, PAIRS, beta=0.5)
    h = [2.0, -2.0, 0.0, 6.0]
    assert metrics["accuracy"]["value"] == 2.5 / 4  # a tie is half
    assert metrics["ties"] == 1
    assert metrics["loss"] == pytest.approx(sum(math.log1p(math.exp(-0.5 * value)) for value in h) / 4)
    assert metrics["margin"] == pytest.approx(0.5 * sum(h) / 4)
    assert metrics["by_category"]["x"]["accuracy"]["value"] == 0.5
    assert metrics["by_category"]["y"]["accuracy"]["value"] == 0.75


def test_without_a_reference_means_per_token_are_compared():
    policy = logps([-4.0], [-6.0], [2], [6])
    assert log_ratios(policy, None).tolist() == [-2.0 + 1.0]


def test_flips_fitted_looks_at_flipped_pairs_alone():
    flipped = torch.tensor([True, True, False, False])
    assert flips_fitted(POLICY, REFERENCE, flipped).value == 0.5
    assert flips_fitted(POLICY, REFERENCE, flipped).n == 2
