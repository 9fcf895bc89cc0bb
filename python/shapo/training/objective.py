"""From log-probabilities to the loss of each pair, and from pairs to the loss of a batch that comes in micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from shapo.rewards import PairRewards
from shapo.training.config import LossConfig
from shapo.training.logps import PairLogps
from shapo_kernels import losses


def pair_losses(
    config: LossConfig, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards | None
) -> Tensor:
    """The loss of each pair `[B]`.

    Args:
        config: Which loss, with its parameters.
        policy: What the gradient flows to.
        reference: Needed by every loss but SimPO.
        rewards: Needed by the reward level alone.

    Raises:
        ValueError: The loss needs what is None.
    """
    if config.name == "simpo":
        means = [
            policy.chosen / policy.chosen_tokens.clamp(min=1),
            policy.rejected / policy.rejected_tokens.clamp(min=1),
        ]
        return losses.simpo(*means, beta=config.beta, gamma=_set(config.gamma, "gamma"))
    if reference is None:
        raise ValueError(f"the loss {config.name} needs the reference's log-probabilities")
    logps = (policy.chosen, policy.rejected, reference.chosen, reference.rejected)
    if config.name == "dpo":
        return losses.dpo(*logps, beta=config.beta)
    if config.name == "cdpo":
        return losses.cdpo(*logps, beta=config.beta, epsilon=_set(config.epsilon, "epsilon"))
    if config.name == "rdpo":
        return losses.rdpo(*logps, beta=config.beta, epsilon=_set(config.epsilon, "epsilon"))
    if config.name == "hinge":
        return losses.hinge(*logps, beta=config.beta)
    if config.name == "ipo":
        tokens = (policy.chosen_tokens, policy.rejected_tokens, reference.chosen_tokens, reference.rejected_tokens)
        return losses.ipo(*logps, beta=config.beta, lengths=tokens if config.length_normalized else None)
    if rewards is None:
        raise ValueError("the reward level needs the reward model's scores")
    device = policy.chosen.device
    return losses.reward_level(
        *logps,
        beta=config.beta,
        reward_chosen=rewards.chosen.to(device),
        reward_rejected=rewards.rejected.to(device),
        beta_reward=_set(config.beta_reward, "beta_reward"),
    )


def _set(value: float | None, name: str) -> float:
    if value is None:
        raise ValueError(f"{name} is not set")
    return value
