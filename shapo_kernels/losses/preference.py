"""Pairwise preference losses: from the log-probabilities of a chosen and a rejected response to one loss for each pair.

They share the margin `h = (log pi_w - log pi_l) - (log ref_w - log ref_l)` and, for most, one kernel
`l(z, q) = softplus(-z) + (1 - q) z` of `z = beta h` (:func:`soft_preference`). `aggregation` turns pairs into a
batch's loss, `logps` computes log-probabilities.

Every function takes floating tensors `[B]` of one device, any dtypes, and returns `[B]`: float64 if an input is
float64, else float32. Inside, all is float64: on B numbers it costs nothing, and it keeps 1e-6 relative accuracy of
value and gradient where float32 loses it to cancellation (`q` close to 1, margins close to one another). Infinite
margins give the limit. Every function raises TypeError for integer tensors and ValueError for unequal shapes or devices
and for a parameter that is out of its range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    check_device,
    check_finite,
    check_flip_rate,
    check_floating,
    check_pairs,
    check_positive,
    result_dtype,
)


def soft_preference(z: Tensor, q: float | Tensor) -> Tensor:
    """Logistic loss of the margin `z` when the chosen response is the better one with probability `q`.

    `l(z, q) = softplus(-z) + (1 - q) z = -q log sigmoid(z) - (1 - q) log sigmoid(-z)`, `dl/dz = sigmoid(z) - q`.

    Args:
        z: `[B]` margins.
        q: a number or `[B]`; 1 is DPO, `1 - epsilon` cDPO, `(1 - epsilon) / (1 - 2 epsilon)` rDPO. A tensor may
            require a gradient: `dl/dq = -z`.

    Within 1e-6 relative of the exact value and gradient for `|z| <= 1e4` (results below
    1.2e-38, the smallest normal fp32 number, lose digits or become 0). Both derivatives are differentiable again.
    """
    if isinstance(q, Tensor):
        dtype = check_pairs(z=z, q=q)
        target = q.double()
        return _soft_preference(z.double(), target, 1 - target).to(dtype)
    dtype = check_pairs(z=z)
    check_finite("q", q)
    return _soft_preference(z.double(), q, 1 - q).to(dtype)


def _soft_preference(z: Tensor, q: float | Tensor, complement: float | Tensor) -> Tensor:
    """The kernel itself, for `complement = 1 - q`, which callers often know more exactly than by subtraction.

    The two branches are equal in exact arithmetic; each adds only terms of one sign while `0 <= q <= 1`.
    """
    above = _product(complement, z) - F.logsigmoid(z)
    below = -_product(q, z) - F.logsigmoid(-z)
    return torch.where(z >= 0, above, below)


def _product(share: float | Tensor, z: Tensor) -> Tensor:
    """`share * z`, which is 0 for a share of 0 also where z is infinite."""
    if isinstance(share, Tensor):
        return share * torch.where((share == 0) & z.isinf(), 0.0, z)
    return share * z if share else torch.zeros_like(z)


def dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """DPO: `-log sigmoid(beta h)` (arXiv:2305.18290, eq. 7). Log-probabilities are sums over a response's tokens."""
    check_positive("beta", beta)
    h, dtype = _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return _soft_preference(beta * h, 1.0, 0.0).to(dtype)


def _margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> tuple[Tensor, torch.dtype]:
    """`h` in fp64 and the dtype of the result."""
    dtype = check_pairs(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    policy = policy_chosen.double() - policy_rejected.double()
    reference = ref_chosen.double() - ref_rejected.double()
    return policy - reference, dtype


def cdpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    epsilon: float,
) -> Tensor:
    """Conservative DPO: `l(beta h, 1 - epsilon)` for labels of which a share `epsilon` is flipped.

    `0 <= epsilon < 0.5` (Mitchell, "A note on DPO with noisy preferences", eq. 3). The loss is least where
    `sigmoid(beta h) = 1 - epsilon`, so margins do not grow without end.
    """
    check_positive("beta", beta)
    check_flip_rate("epsilon", epsilon)
    h, dtype = _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return _soft_preference(beta * h, 1 - epsilon, epsilon).to(dtype)


def rdpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    epsilon: float,
) -> Tensor:
    """Robust DPO: `((1 - epsilon) softplus(-z) - epsilon softplus(z)) / (1 - 2 epsilon)` with `z = beta h`.

    `0 <= epsilon < 0.5` (Chowdhury et al., PMLR v235, 2024): an unbiased estimate of DPO's loss on clean labels when
    a share `epsilon` of the labels is flipped. It equals `l(z, q)` at `q = (1 - epsilon) / (1 - 2 epsilon) >= 1`.

    **Unbounded below** for `epsilon > 0`: as `z` grows it falls like `-epsilon / (1 - 2 epsilon) z`, its gradient
    never vanishes, and only early stopping or the learning rate ends the growth of a margin. Losses below zero are no
    error.
    """
    check_positive("beta", beta)
    check_flip_rate("epsilon", epsilon)
    h, dtype = _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    clean = 1 - 2 * epsilon
    return _soft_preference(beta * h, (1 - epsilon) / clean, -epsilon / clean).to(dtype)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    lengths: Sequence[Tensor] | None = None,
) -> Tensor:
    """IPO: `(h - 1 / (2 beta))^2` (arXiv:2310.12036, eq. 17, whose tau is beta).

    Args:
        lengths: `None` takes `h` of the sums, as the paper writes it. Four tensors `[B]`, the token counts of
            `policy_chosen, policy_rejected, ref_chosen, ref_rejected` in this order, take `h` of per-token means,
            as TRL does. The two are different losses and want different `beta`. The mean over no token is 0.
    """
    check_positive("beta", beta)
    logps = [policy_chosen, policy_rejected, ref_chosen, ref_rejected]
    if lengths is not None:
        if isinstance(lengths, Tensor) or len(lengths) != 4:
            raise ValueError(
                "lengths must be four tensors [B], the token counts of policy_chosen, policy_rejected, ref_chosen and "
                "ref_rejected, or None"
            )
        logps = [token_mean(sums, counts) for sums, counts in zip(logps, lengths, strict=True)]
    h, dtype = _margin(*logps)
    return ((h - 1 / (2 * beta)) ** 2).to(dtype)


def token_mean(sums: Tensor, counts: Tensor) -> Tensor:
    """Per-token means `[B]` of summed log-probabilities; 0 (with a gradient of 0) for a response without a token.

    What :func:`simpo` takes, made of what `sequence_logps` returns. fp64 for fp64 sums, else fp32.
    """
    check_floating("sums", sums)
    if not isinstance(counts, Tensor) or counts.shape != sums.shape:
        given = list(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"the token counts are {given}: expected {list(sums.shape)}, one for each log-probability")
    check_device("counts", counts, "sums", sums)
    return (sums.double() / counts.clamp(min=1)).to(result_dtype(sums))


def simpo(policy_chosen_mean: Tensor, policy_rejected_mean: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimPO: `-log sigmoid(beta (mean_w - mean_l) - gamma)` (arXiv:2405.14734, eq. 6); no reference model.

    Args:
        policy_chosen_mean, policy_rejected_mean: `[B]` log-probabilities *per token* (:func:`token_mean`).
        gamma: the target margin itself. The paper's code and its tables quote `gamma / beta` ("gamma_beta_ratio"):
            multiply that by `beta` first.
    """
    check_positive("beta", beta)
    check_finite("gamma", gamma)
    dtype = check_pairs(policy_chosen_mean=policy_chosen_mean, policy_rejected_mean=policy_rejected_mean)
    z = beta * (policy_chosen_mean.double() - policy_rejected_mean.double()) - gamma
    return _soft_preference(z, 1.0, 0.0).to(dtype)


def hinge(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """Hinge: `relu(1 - beta h)`.

    SLiC's loss (arXiv:2305.10425), of the margin against a reference as in RSO (arXiv:2309.06657). The gradient at
    `beta h = 1` is taken as 0.
    """
    check_positive("beta", beta)
    h, dtype = _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return F.relu(1 - beta * h).to(dtype)


def reward_level(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    beta_reward: float,
) -> Tensor:
    """ShaPO's reward level: `l(beta h, q)`, `q = sigmoid(beta_reward (reward_chosen - reward_rejected))`.

    Args:
        reward_chosen, reward_rejected: `[B]` scores of a reward model, higher for the better response
            (arXiv:2602.07340). The score of a *cost* model enters negated.
        beta_reward: how sharply rewards become labels; as it grows the loss becomes DPO with labels set by the rewards.
    """
    check_positive("beta", beta)
    check_positive("beta_reward", beta_reward)
    h, dtype = _margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    check_pairs(policy_chosen=policy_chosen, reward_chosen=reward_chosen, reward_rejected=reward_rejected)
    preference = beta_reward * (reward_chosen.double() - reward_rejected.double())
    # sigmoid(-x) and not 1 - sigmoid(x), which is 0 from x = 37 on and takes the whole loss of a large margin with it.
    return _soft_preference(beta * h, torch.sigmoid(preference), torch.sigmoid(-preference)).to(dtype)
