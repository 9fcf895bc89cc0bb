"""Preference losses, their aggregation over a batch, and the log-probabilities they are computed from.

Needs only torch. Each formula is written once: losses of pairs in `preference`, the mean, Dr.DPO and the likelihood
term in `aggregation`, sequence log-probabilities in `logps`. `registry` names the losses and combines the parts.
"""

from ..ops import TokenLogps, linear_token_logps
from .aggregation import WholeBatch, chosen_nll, drdpo, mean, whole_batch
from .linear_preference import linear_preference_loss, saves_a_product
from .logps import linear_sequence_logps, sequence_logps
from .preference import cdpo, dpo, hinge, ipo, rdpo, reward_level, simpo, soft_preference, token_mean
from .registry import AGGREGATIONS, PAIRWISE, LossSpec, PreferenceBatch, PreferenceLoss, PreferenceOutput

__all__ = [
    "AGGREGATIONS",
    "PAIRWISE",
    "LossSpec",
    "PreferenceBatch",
    "PreferenceLoss",
    "PreferenceOutput",
    "TokenLogps",
    "WholeBatch",
    "cdpo",
    "chosen_nll",
    "dpo",
    "drdpo",
    "hinge",
    "ipo",
    "linear_preference_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "mean",
    "rdpo",
    "reward_level",
    "saves_a_product",
    "sequence_logps",
    "simpo",
    "soft_preference",
    "token_mean",
    "whole_batch",
]
