"""A run's loss settings and its numbers of a batch, brought into the form that `shapo_kernels.losses` takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shapo.config import LossConfig
from shapo.scoring.logps import PairLogps
from shapo.scoring.rewards import PairRewards
from shapo_kernels.losses import PreferenceBatch, PreferenceLoss


def make_loss(config: LossConfig, *, group: Any = None) -> PreferenceLoss:
    """The loss with its aggregation, as an object that takes batches; `group` are the processes that share one."""
    parameters = {
        name: value
        for name in ("beta", "epsilon", "gamma", "beta_reward", "beta_prime")
        if (value := getattr(config, name)) is not None
    }
    return PreferenceLoss(config.name, config.aggregation, nll=config.nll, group=group, **parameters)


def make_batch(policy: PairLogps, reference: PairLogps | None, rewards: PairRewards | None) -> PreferenceBatch:
    """The numbers of B pairs; all on the policy's device afterwards."""
    device = policy.chosen.device
    reference = None if reference is None else reference.to(device)
    return PreferenceBatch(
        policy_chosen=policy.chosen,
        policy_rejected=policy.rejected,
        ref_chosen=None if reference is None else reference.chosen,
        ref_rejected=None if reference is None else reference.rejected,
        chosen_counts=policy.chosen_tokens,
        rejected_counts=policy.rejected_tokens,
        reward_chosen=None if rewards is None else rewards.chosen.to(device),
        reward_rejected=None if rewards is None else rewards.rejected.to(device),
    )


def pair_losses(
    config: LossConfig, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards | None
) -> Tensor:
    """The loss of each pair `[B]`, whatever the aggregation, without the likelihood term.

    Raises:
        ValueError: The loss needs what is None, or does not use what is given.
    """
    return make_loss(config)(make_batch(policy, reference, rewards)).per_pair
