"""Which neurons to perturb: by the probe, by the gradient, at random, or all of them.

Every function returns a `shapo_kernels.Subspace` whose metadata says how it was made. The scores that the first two
rank by are public too. Training a probe is for `probe`, perturbing is for `shapo_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shapo.checked import checked
from shapo.config import LossConfig
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import PairEncoder
from shapo.errors import UserError
from shapo.models.architectures import ValueVectors, value_vectors
from shapo.models.fused_head import find_fused_head
from shapo.models.modes import evaluating
from shapo.ranks import ALONE, Ranks
from shapo.scoring.logps import PairLogps, TokenizedPairs, batch_logps
from shapo.scoring.objective import pair_losses
from shapo.scoring.rewards import PairRewards
from shapo_kernels import Subspace, ops

__all__ = [
    "full_neurons",
    "full_parameters",
    "gradient_scores",
    "neuron_sizes",
    "probe_scores",
    "random_like",
    "random_subspace",
    "select_by_gradient",
    "select_by_probe",
]


def neuron_sizes(model: nn.Module) -> dict[str, int]:
    """Name of each value-vector weight -> its number of neurons."""
    return value_vectors(model).sizes


def probe_scores(model: nn.Module, direction: Tensor) -> dict[str, Tensor]:
    """Name -> `[neurons]`: the cosine of each value vector with the probe's direction, fp32 (fp64 for fp64 weights).

    Raises:
        UserError: a direction of another length, zero or not finite; weights that are quantised.
    """
    vectors = value_vectors(model)
    if list(direction.shape) != [vectors.hidden_size]:
        raise UserError(
            f"the direction has the shape {list(direction.shape)}, the model's value vectors the length "
            f"{vectors.hidden_size}; use a probe that was trained on this model"
        )
    if not direction.isfinite().all() or not direction.any():
        raise UserError("the probe's direction is zero or not finite; train the probe anew")
    scores = {}
    for name, weight in _plain_weights(vectors).items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scores[name] = ops.column_cosine(weight.detach(), direction.to(weight.device, dtype), axis=vectors.axis)
    return scores


def select_by_probe(
    model: nn.Module,
    direction: Tensor,
    percent: float,
    *,
    depth: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> Subspace:
    """The critical neurons as published: those most opposed to "unsafe", the lowest `percent` over all layers together.

    Args:
        model: a supported architecture; see `architectures`.
        direction: `Probe.direction`, `[hidden]`.
        percent: share of all neurons, 0 < percent <= 100; as many are selected at any depth.
        depth: share of the layers to select from, from the top, in (0, 1].
        metadata: text to keep with the subspace, such as the probe's data.

    Raises:
        UserError: see `probe_scores`; a percentage out of range.
    """
    vectors, share = _upper(model, percent, depth)
    scores = probe_scores(model, direction)
    subspace = Subspace.top({name: scores[name] for name in vectors.names}, share, axis=vectors.axis)
    return _described(subspace, vectors, "probe", percent, depth, metadata)


@checked
def gradient_scores(
    model: nn.Module,
    encoder: PairEncoder,
    pairs: Sequence[PreferencePair],
    *,
    beta: float = 0.1,
    loss: str | LossConfig = "dpo",
    reference: PairLogps | None = None,
    rewards: PairRewards | None = None,
    batch_size: int = 8,
    bf16: bool = False,
    depth: float = 1.0,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    r"""Name -> `[neurons]` fp64: the norm of the alignment loss's mean gradient on each value vector.

    .. math:: s_i = \Big\| \frac1N \sum_{n=1}^{N} \nabla_{W_i} \ell_n \Big\|_2

    over all pairs: exact whatever the batch size, in eval mode. Only value vectors get a gradient; it is accumulated in
    fp32 (fp64 for fp64 weights), so two copies of the value vectors' size are held at most. `.grad` is not touched.

    Args:
        model: a supported architecture; see `architectures`.
        encoder: the template and truncation that training uses too.
        pairs: a held-out split that neither training nor evaluation sees.
        beta: of the loss where it is given by name.
        loss: one of `config.LOSSES`, or a `LossConfig` (aggregation "mean").
        reference: the reference's log-probabilities of `pairs`. Without them the model is its own reference, as at the
            start of training.
        rewards: the reward model's scores of `pairs`, for the reward level.
        batch_size: pairs that go through the model together.
        bf16: compute under bf16 autocast.
        depth: share of the layers, from the top, in (0, 1].
        progress: show a progress bar.
        ranks: processes that go over the pairs between them; all have the result.

    Raises:
        UserError: no pairs, quantised weights, a loss that cannot be meant.
    """
    config = LossConfig(name=loss, beta=beta) if isinstance(loss, str) else loss
    if config.aggregation != "mean":
        raise UserError(f"neurons are ranked by the gradient of the mean loss; the aggregation is {config.aggregation}")
    if config.nll:
        raise UserError("neurons are ranked by the gradient of the preference loss alone; leave nll out")
    if config.uses_rewards != (rewards is not None):
        needs = "needs" if config.uses_rewards else "does not use"
        raise UserError(f"the loss {config.name} {needs} a reward model's scores of the selection split")
    if reference is not None and not config.uses_reference:
        raise UserError(f"the loss {config.name} does not use a reference; leave it out")
    data = TokenizedPairs(pairs, encoder)
    vectors = value_vectors(model).upper(depth)
    weights = _plain_weights(vectors)
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights.values()]
    device, own = next(iter(weights.values())).device, ranks.share(len(data))
    head = find_fused_head(model)
    with (
        evaluating(model),
        _only_trainable(model, list(weights.values())),
        torch.enable_grad(),
        tqdm(total=len(own), desc="gradient", disable=not progress, unit="pair") as bar,
    ):
        for start in range(0, len(own), batch_size):
            indices = list(own[start : start + batch_size])
            policy = batch_logps(model, data.batch(indices, device), bf16=bf16, head=head)
            compared = None
            if config.uses_reference:
                compared = _detached(policy) if reference is None else reference[indices].to(device)
            scores = rewards[indices] if rewards is not None else None
            total = pair_losses(config, policy, compared, scores).sum() / len(data)
            for accumulated, gradient in zip(sums, torch.autograd.grad(total, list(weights.values())), strict=True):
                accumulated += gradient
            bar.update(len(indices))
    other = 1 - vectors.axis
    return {
        name: torch.linalg.vector_norm(ranks.summed(gradient), dim=other, dtype=torch.float64).cpu()
        for name, gradient in zip(weights, sums, strict=True)
    }


@checked
def select_by_gradient(
    model: nn.Module,
    encoder: PairEncoder,
    pairs: Sequence[PreferencePair],
    percent: float,
    *,
    beta: float = 0.1,
    loss: str | LossConfig = "dpo",
    reference: PairLogps | None = None,
    rewards: PairRewards | None = None,
    batch_size: int = 8,
    bf16: bool = False,
    depth: float = 1.0,
    progress: bool = True,
    ranks: Ranks = ALONE,
    metadata: Mapping[str, str] | None = None,
) -> Subspace:
    """The neurons on which the alignment loss has the largest gradient; arguments as for `gradient_scores`.

    `percent` is a share of all neurons; as many are selected at any depth.

    Raises:
        UserError: see `gradient_scores`; a percentage out of range.
    """
    vectors, share = _upper(model, percent, depth)
    scores = gradient_scores(
        model,
        encoder,
        pairs,
        beta=beta,
        loss=loss,
        reference=reference,
        rewards=rewards,
        batch_size=batch_size,
        bf16=bf16,
        depth=depth,
        progress=progress,
        ranks=ranks,
    )
    if not all(values.isfinite().all() for values in scores.values()):
        raise UserError("the loss's gradient on the selection split is not finite; check the model's weights")
    subspace = Subspace.top(scores, share, largest=True, axis=vectors.axis)
    made = {"loss": loss if isinstance(loss, str) else loss.name, "pairs": str(len(pairs)), **(metadata or {})}
    return _described(subspace, vectors, "gradient", percent, depth, made)


def random_subspace(
    model: nn.Module,
    percent: float,
    *,
    seed: int,
    match: str = "total",
    depth: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> Subspace:
    """As many neurons drawn at random: over all layers together ("total"), or the same share of each ("layer").

    `percent` is a share of all neurons; as many are drawn from the upper share `depth` of the layers.

    Raises:
        UserError: a percentage out of range, another `match`.
    """
    vectors, share = _upper(model, percent, depth)
    if match not in ("total", "layer"):
        raise UserError(f"match is {match!r}; expected total or layer")
    subspace = Subspace.random(vectors.sizes, share, seed=seed, axis=vectors.axis, match=match)
    made = {"seed": str(seed), **(metadata or {})}
    return _described(subspace, vectors, f"random-{match}", percent, depth, made)


def random_like(
    model: nn.Module, subspace: Subspace, *, seed: int, metadata: Mapping[str, str] | None = None
) -> Subspace:
    """As many neurons of each layer as `subspace` has, drawn at random: the control matched to it layer by layer.

    Raises:
        shapo_kernels.SubspaceError: the subspace has weights that are not this model's value vectors.
    """
    vectors = value_vectors(model)
    drawn = Subspace.random_like(subspace, vectors.sizes, seed=seed)
    percent = 100 * subspace.count / sum(vectors.sizes.values())
    like = {"like": subspace.metadata.get("method", "unknown"), "seed": str(seed)}
    return _described(drawn, vectors, "random-like", percent, 1.0, {**like, **(metadata or {})})


def full_neurons(model: nn.Module, *, depth: float = 1.0, metadata: Mapping[str, str] | None = None) -> Subspace:
    """Every neuron of the upper share `depth` of the layers: their value vectors, and no other parameter."""
    everything = value_vectors(model)
    vectors = everything.upper(depth)
    subspace = Subspace({name: torch.arange(size) for name, size in vectors.sizes.items()}, vectors.axis)
    percent = 100 * subspace.count / sum(everything.sizes.values())
    return _described(subspace, vectors, "full-neurons", percent, depth, metadata)


def full_parameters(model: nn.Module, *, metadata: Mapping[str, str] | None = None) -> Subspace:
    """Every floating-point parameter, whole: the uniform control, ordinary SAM. Any architecture."""
    subspace = Subspace.full(model)
    subspace.metadata.update(metadata or {})
    return subspace


def _described(
    subspace: Subspace,
    vectors: ValueVectors,
    method: str,
    percent: float,
    depth: float,
    metadata: Mapping[str, str] | None,
) -> Subspace:
    subspace.metadata.update({"method": method, "percent": f"{percent:g}", "model_type": vectors.model_type})
    if depth != 1:
        subspace.metadata["depth"] = f"{depth:g}"
    subspace.metadata.update(metadata or {})
    return subspace


def _upper(model: nn.Module, percent: float, depth: float) -> tuple[ValueVectors, float]:
    """The layers to select from, and which percentage of their neurons is `percent` of all.

    Raises:
        UserError: a percentage or a depth out of range, or more neurons than these layers have.
    """
    if not 0 < percent <= 100:
        raise UserError(f"percent is {percent}; expected a number above 0, up to 100")
    vectors = value_vectors(model)
    if depth == 1:
        return vectors, percent
    upper = vectors.upper(depth)
    share = percent * sum(vectors.sizes.values()) / sum(upper.sizes.values())
    if share > 100:
        raise UserError(
            f"{percent:g} % of all neurons are more than the upper {len(upper.names)} of {len(vectors.names)} layers "
            "have: choose a lower percentage or a greater depth"
        )
    return upper, share


def _plain_weights(vectors: ValueVectors) -> dict[str, nn.Parameter]:
    """The weights, each a floating-point matrix of value vectors.

    Raises:
        UserError: a quantised weight, which has no value vectors to look at.
    """
    for name, weight in vectors.weights.items():
        shape = [vectors.hidden_size, vectors.sizes[name]]
        if not weight.is_floating_point() or list(weight.shape) != (shape if vectors.axis else shape[::-1]):
            raise UserError(
                f"{name} is quantised ({weight.dtype}, {list(weight.shape)}); select on the model in full precision"
            )
    return vectors.weights


@contextmanager
def _only_trainable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only `weights` require a gradient inside; every parameter's flag is put back on leaving."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _detached(logps: PairLogps) -> PairLogps:
    return PairLogps(*(value.detach() for value in logps.tensors().values()))
