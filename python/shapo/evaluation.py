"""What a trained model is measured by on preference pairs: accuracy, loss, margins, memorised flips.

Its answers are for `answers` to write, for `judges` to judge, and for `safety` to count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shapo.checked import checked
from shapo.data.pairs import PreferencePair
from shapo.scoring.logps import PairLogps
from shapo.statistics import Share, wilson
from shapo_kernels import losses


@checked
def preference_metrics(
    policy: PairLogps,
    reference: PairLogps | None,
    pairs: Sequence[PreferencePair],
    *,
    beta: float,
    by_category: bool = True,
) -> dict[str, Any]:
    """Preference accuracy, loss and margin of `pairs` as they are labelled.

    A pair's h is (log pi_w - log pi_l) - (log ref_w - log ref_l), or without a reference the difference of the mean
    log-probabilities per token (SimPO's).  The accuracy is the share with h > 0, a tie counting half; the margin is
    beta h; the loss is DPO's, softplus(-beta h), whatever the model was trained with, so that methods can be compared.

    Returns:
        accuracy (value, low, high, n), loss, margin, ties, and by category the accuracy and the margin.
    """
    h = log_ratios(policy, reference)
    result: dict[str, Any] = {
        "accuracy": _accuracy(h).as_dict(),
        "loss": losses.soft_preference(beta * h, torch.ones_like(h)).mean().item(),
        "margin": beta * h.mean().item(),
        "ties": int((h == 0).sum()),
    }
    if by_category:
        names = sorted({pair.category for pair in pairs})
        masks = {name: torch.tensor([pair.category == name for pair in pairs]) for name in names}
        result["by_category"] = {
            name: {"accuracy": _accuracy(h[mask]).as_dict(), "margin": beta * h[mask].mean().item()}
            for name, mask in masks.items()
        }
    return result


def flips_fitted(policy: PairLogps, reference: PairLogps | None, flipped: Tensor) -> Share:
    """Among the training pairs with a flipped label, the share whose wrong label the model agrees with (h > 0)."""
    return _accuracy(log_ratios(policy, reference)[flipped])


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """h of each pair `[B]` in fp64; see `preference_metrics`."""
    if reference is None:
        chosen = policy.chosen.double() / policy.chosen_tokens.clamp(min=1)
        return chosen - policy.rejected.double() / policy.rejected_tokens.clamp(min=1)
    learned = policy.chosen.double() - policy.rejected.double()
    return learned - (reference.chosen.double() - reference.rejected.double())


def _accuracy(h: Tensor) -> Share:
    return wilson(float((h > 0).sum()) + 0.5 * float((h == 0).sum()), h.numel())
