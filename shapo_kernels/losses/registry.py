"""Preference losses by name: what each needs, and one object that takes a batch's log-probabilities to its loss.

For training loops and command lines. If you know the loss, call its function in `preference` directly. Nothing is
ignored: a parameter, a reward or a reference that the loss does not use is an error. Token counts are the one
exception, because every log-probability comes with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch.distributed as dist
from torch import Tensor

from . import aggregation as aggregations
from . import preference
from ._checks import check_choice, check_finite, check_flip_rate, check_not_negative, check_positive, result_dtype
from .preference import token_mean


@dataclass(frozen=True)
class LossSpec:
    """What a pairwise loss is and needs.

    Attributes:
        summary: one line, for `--help`.
        function: of `preference`.
        parameters: the names of its numbers; each is required.
        uses_reference: it compares with a reference model.
        uses_rewards: its labels come from a reward model.
        per_token: it takes log-probabilities per token, so token counts are needed.
    """

    summary: str
    function: Callable[..., Tensor]
    parameters: tuple[str, ...]
    uses_reference: bool = True
    uses_rewards: bool = False
    per_token: bool = False


PAIRWISE: Mapping[str, LossSpec] = MappingProxyType(
    {
        "dpo": LossSpec("DPO: -log sigmoid(beta h)", preference.dpo, ("beta",)),
        "cdpo": LossSpec("conservative DPO: soft labels 1 - epsilon", preference.cdpo, ("beta", "epsilon")),
        "rdpo": LossSpec("robust DPO: unbiased under a flip rate epsilon", preference.rdpo, ("beta", "epsilon")),
        "ipo": LossSpec("IPO: (h - 1 / (2 beta))^2, h of sums", preference.ipo, ("beta",)),
        "ipo_mean": LossSpec("IPO, h of per-token means", preference.ipo, ("beta",), per_token=True),
        "simpo": LossSpec(
            "SimPO: per-token means, target margin gamma, no reference",
            preference.simpo,
            ("beta", "gamma"),
            uses_reference=False,
            per_token=True,
        ),
        "hinge": LossSpec("hinge: relu(1 - beta h)", preference.hinge, ("beta",)),
        "reward_level": LossSpec(
            "ShaPO's reward level: soft labels from a reward model",
            preference.reward_level,
            ("beta", "beta_reward"),
            uses_rewards=True,
        ),
    }
)

AGGREGATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType({"mean": (), "drdpo": ("beta_prime",)})
"""Name of an aggregation -> the names of its numbers."""

_CHECKS: Mapping[str, Callable[[str, float], None]] = {
    "beta": check_positive,
    "epsilon": check_flip_rate,
    "gamma": check_finite,
    "beta_reward": check_positive,
    "beta_prime": check_positive,
}

_POLICY = ("policy_chosen", "policy_rejected")
_REFERENCE = ("ref_chosen", "ref_rejected")
_COUNTS = ("chosen_counts", "rejected_counts")
_REWARDS = ("reward_chosen", "reward_rejected")


@dataclass(frozen=True)
class PreferenceBatch:
    """Log-probabilities of B pairs, all `[B]`; what a loss needs is in its :class:`LossSpec`.

    Attributes:
        policy_chosen, policy_rejected: sums over a response's tokens, with a gradient.
        ref_chosen, ref_rejected: the reference model's.
        chosen_counts, rejected_counts: tokens of each response, as `sequence_logps` counts them.
        reward_chosen, reward_rejected: scores of a reward model, higher for the better response.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_counts: Tensor | None = None
    rejected_counts: Tensor | None = None
    reward_chosen: Tensor | None = None
    reward_rejected: Tensor | None = None


@dataclass(frozen=True)
class PreferenceOutput:
    """A batch's loss and its parts; only `loss` and `per_pair` have a gradient.

    Attributes:
        loss: scalar.
        per_pair: `[B]`.
        chosen_rewards, rejected_rewards: `[B]` implicit rewards `beta (log pi - log ref)`; of per-token means for
            the losses that use them, without the reference for those that have none.
        margin: `[B]`, their difference; a pair is ranked correctly if it is above 0.
        nll: scalar, the chosen responses' mean negative log-likelihood (or its share), without its weight; `None`
            where the loss has no such term. `loss` holds it, `per_pair` does not.
    """

    loss: Tensor
    per_pair: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margin: Tensor
    nll: Tensor | None = None


class PreferenceLoss:
    """A pairwise loss with its aggregation: `PreferenceLoss("cdpo", "drdpo", beta=0.1, epsilon=0.2, beta_prime=1.0)`.

    Args:
        name: a key of `PAIRWISE`.
        aggregation: a key of `AGGREGATIONS`.
        group: the processes that share a batch, see `aggregation`; `None` is this one alone.
        nll: weight of :func:`aggregation.chosen_nll`, which is added to the aggregated loss; 0 for none.
        parameters: exactly the numbers that the two need.

    Raises:
        ValueError: an unknown name; a parameter that is missing, not used or out of range.
    """

    def __init__(
        self,
        name: str,
        aggregation: str = "mean",
        *,
        group: dist.ProcessGroup | None = None,
        nll: float = 0.0,
        **parameters: float,
    ) -> None:
        check_choice("loss", name, PAIRWISE)
        check_choice("aggregation", aggregation, AGGREGATIONS)
        check_not_negative("nll", nll)
        self.name, self.aggregation, self.group, self.nll = name, aggregation, group, nll
        self.spec = PAIRWISE[name]
        needed = self.spec.parameters + AGGREGATIONS[aggregation]
        for parameter in parameters:
            if parameter not in needed:
                raise ValueError(
                    f"{name} with {aggregation} has no parameter {parameter!r}: it takes {', '.join(needed)}"
                )
        for parameter in needed:
            if parameter not in parameters:
                raise ValueError(f"{name} with {aggregation} needs a value for {parameter!r}")
            _CHECKS[parameter](parameter, parameters[parameter])
        self.parameters: Mapping[str, float] = MappingProxyType(dict(parameters))

    def __repr__(self) -> str:
        numbers = "".join(f", {name}={value}" for name, value in self.parameters.items())
        numbers += f", nll={self.nll}" if self.nll else ""
        return f"PreferenceLoss({self.name!r}, {self.aggregation!r}{numbers})"

    @property
    def needs_whole_batch(self) -> bool:
        """Whether micro-batches need the losses of all others: :meth:`whole_batch` of a first pass without a gradient.

        The mean of equal micro-batches is simply averaged. The likelihood needs no such pass, but the number of tokens
        of the whole batch.
        """
        return bool(AGGREGATIONS[self.aggregation])

    def __call__(self, batch: PreferenceBatch, *, whole: aggregations.WholeBatch | None = None) -> PreferenceOutput:
        """The loss of a batch, or with `whole` the share of a micro-batch: shares add up, so they are not averaged.

        Raises:
            ValueError: the batch lacks what the loss needs, or has rewards or a reference that it does not use.
        """
        logps = self._logps(batch)
        rewards = {name: getattr(batch, name) for name in _REWARDS if self.spec.uses_rewards}
        numbers = {name: self.parameters[name] for name in self.spec.parameters}
        per_pair = self.spec.function(*logps, **rewards, **numbers)
        chosen, rejected = self._implicit_reward(logps[::2]), self._implicit_reward(logps[1::2])
        loss, nll = self.aggregate(per_pair, whole=whole), None
        if self.nll:
            nll = self._nll(batch, whole)
            loss, nll = loss + self.nll * nll, nll.detach()
        return PreferenceOutput(loss, per_pair, chosen, rejected, chosen - rejected, nll)

    def _nll(self, batch: PreferenceBatch, whole: aggregations.WholeBatch | None) -> Tensor:
        self._check_fields(batch, _COUNTS, True)
        assert batch.chosen_counts is not None
        group = None if whole is not None else self.group
        return aggregations.chosen_nll(batch.policy_chosen, batch.chosen_counts, group=group, whole=whole)

    def _logps(self, batch: PreferenceBatch) -> list[Tensor]:
        """Policy (chosen, rejected) and, where there is one, reference (chosen, rejected): sums or per-token means."""
        self._check_fields(batch, _REFERENCE, self.spec.uses_reference)
        self._check_fields(batch, _REWARDS, self.spec.uses_rewards)
        names = _POLICY + (_REFERENCE if self.spec.uses_reference else ())
        logps = [getattr(batch, name) for name in names]
        if not self.spec.per_token:
            return logps
        self._check_fields(batch, _COUNTS, True)
        return [token_mean(sums, getattr(batch, _COUNTS[side % 2])) for side, sums in enumerate(logps)]

    def _check_fields(self, batch: PreferenceBatch, names: tuple[str, str], needed: bool) -> None:
        for name in names:
            given = getattr(batch, name) is not None
            if needed and not given:
                raise ValueError(f"the loss {self.name} needs {name}: pass it in the batch")
            if given and not needed:
                raise ValueError(f"the loss {self.name} does not use {name}: leave it out, or choose a loss that does")

    def _implicit_reward(self, logps: list[Tensor]) -> Tensor:
        policy, *reference = (tensor.detach().double() for tensor in logps)
        reward = self.parameters["beta"] * (policy - reference[0] if reference else policy)
        return reward.to(result_dtype(*logps))

    def whole_batch(
        self, per_pair: Tensor | Sequence[Tensor], *, chosen_counts: Tensor | None = None
    ) -> aggregations.WholeBatch:
        """What micro-batches need to know of each other, from the `per_pair` of all of them.

        `chosen_counts` are the tokens of all chosen responses, which the likelihood (`nll`) needs.
        """
        beta_prime = self.parameters.get("beta_prime")
        return aggregations.whole_batch(per_pair, beta_prime=beta_prime, group=self.group, chosen_counts=chosen_counts)

    def aggregate(self, per_pair: Tensor, *, whole: aggregations.WholeBatch | None = None) -> Tensor:
        """A batch's loss from those of its pairs."""
        group = None if whole is not None else self.group
        if self.aggregation == "mean":
            return aggregations.mean(per_pair, group=group, whole=whole)
        return aggregations.drdpo(per_pair, beta_prime=self.parameters["beta_prime"], group=group, whole=whole)
