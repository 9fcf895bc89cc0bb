"""A reward model made of a frozen language model and a linear head fitted to clean preferences, and how sharp its soft
labels are.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from shapo.checked import checked
from shapo.data.pairs import PreferencePair
from shapo.errors import UserError, first_line
from shapo.models.modes import evaluating
from shapo.scoring.rewards import PairRewards, RewardScorer, pad

__all__ = ["HeadFit", "fit_reward_head", "histogram", "reward_model_of", "saturated", "sharpness_hint", "soft_labels"]

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_FOLDS = 5
_NEAR = 0.01


@dataclass(frozen=True)
class HeadFit:
    """How a head was fitted.

    Attributes:
        penalty: The ridge penalty that held-out prompts chose.
        accuracy: Share of the held-out pairs that it has right.
        pairs: Number of pairs.
    """

    penalty: float
    accuracy: float
    pairs: int


def reward_model_of(model: Any) -> Any:
    """A sequence-classification model of one score with the body of a causal language model and a head of zeros.

    Raises:
        UserError: An architecture that transformers has no such model of.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        made: Any = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
        made.base_model.load_state_dict(model.base_model.state_dict())
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"no reward model can be made of a {type(model).__name__}: {first_line(error)}") from error
    for parameter in getattr(made, "score", nn.Identity()).parameters():
        nn.init.zeros_(parameter)
    return made.to(model.device).eval()


@checked
def fit_reward_head(scorer: RewardScorer, pairs: Sequence[PreferencePair], *, progress: bool = True) -> HeadFit:
    r"""Fits the linear head of the scorer's model in place; the rest of the model is left alone.

    .. math:: \min_w \frac1N \sum_n \mathrm{softplus}(-w^\top d_n) + \tfrac\lambda2 \|w\|^2

    with d the difference of the two responses' last hidden states at the last token, in units of its root mean square.
    The penalty is chosen by the loss on prompts held out in five folds.

    Args:
        scorer: With a model whose head is a linear layer `score` without bias, as transformers gives decoders.
        pairs: Pairs with clean labels, of at least five prompts.

    Raises:
        UserError: No such head, or too few prompts.
    """
    head = getattr(scorer.model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise UserError(f"{type(scorer.model).__name__} has no linear head `score` of one output to fit")
    folds = torch.tensor([_fold(pair.prompt) for pair in pairs])
    if len({pair.prompt for pair in pairs}) < _FOLDS:
        raise UserError(f"a head is chosen on held-out prompts, of which at least {_FOLDS} are needed")
    difference = _differences(scorer, head, pairs, progress)
    scale = difference.square().mean().sqrt().clamp(min=1e-12)
    unit = difference / scale
    best: tuple[float, float, float] | None = None
    for penalty in PENALTIES:
        margins = torch.zeros(len(unit), dtype=torch.float64)
        for fold in folds.unique():
            own = folds == fold
            margins[own] = unit[own] @ _fitted(unit[~own], penalty)
        loss = functional.softplus(-margins).mean().item()
        if best is None or loss < best[0]:
            best = (loss, penalty, (margins > 0).double().mean().item())
    assert best is not None
    with torch.no_grad():
        head.weight.copy_((_fitted(unit, best[1]) / scale)[None])
    return HeadFit(best[1], best[2], len(pairs))


def soft_labels(rewards: PairRewards, beta_reward: float) -> Tensor:
    """q = sigmoid(beta_reward (r_chosen - r_rejected)) of every pair, `[N]` fp64."""
    return torch.sigmoid(beta_reward * (rewards.chosen.double() - rewards.rejected.double()))


def histogram(rewards: PairRewards, beta_reward: float) -> list[int]:
    """How many pairs have a soft label in each twentieth of [0, 1]."""
    return [int(count) for count in torch.histc(soft_labels(rewards, beta_reward), bins=20, min=0.0, max=1.0)]


def saturated(rewards: PairRewards, beta_reward: float) -> float:
    """Share of the soft labels within 0.01 of 0 or 1: there the reward level is the token level with hard labels."""
    q = soft_labels(rewards, beta_reward)
    return float((torch.minimum(q, 1 - q) < _NEAR).double().mean())


def sharpness_hint(rewards: PairRewards) -> float:
    """The beta_reward at which the median pair has the soft label 0.9 or 0.1."""
    median = (rewards.chosen.double() - rewards.rejected.double()).abs().median().item()
    return math.log(9) / median if median > 0 else 1.0


def _differences(scorer: RewardScorer, head: nn.Linear, pairs: Sequence[PreferencePair], progress: bool) -> Tensor:
    """Last hidden states at the last token, chosen minus rejected, `[N, hidden]` fp64."""
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = scorer.encode_all([pair.prompt for pair in pairs] * 2, responses)
    device = head.weight.device
    found = torch.empty(len(rows), head.in_features, dtype=torch.float64)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    try:
        with evaluating(scorer.model), torch.no_grad():
            for start in tqdm(
                range(0, len(rows), scorer.batch_size), desc="features", unit="batch", disable=not progress
            ):
                indices = order[start : start + scorer.batch_size]
                batch: dict[str, Any] = pad([rows[index] for index in indices], scorer.pad_token_id)
                scorer.model(**{name: value.to(device) for name, value in batch.items()})
                last = batch["attention_mask"].sum(dim=1) - 1
                found[indices] = seen.pop()[torch.arange(len(indices)), last].double().cpu()
    finally:
        handle.remove()
    return found[: len(pairs)] - found[len(pairs) :]


def _fitted(difference: Tensor, penalty: float) -> Tensor:
    weight = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.softplus(-(difference @ weight)).mean() + 0.5 * penalty * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return weight.detach()


def _fold(prompt: str) -> int:
    return hashlib.sha256(prompt.encode()).digest()[0] % _FOLDS
