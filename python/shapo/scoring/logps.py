"""Log-probabilities of the two responses of each pair: tokenised once, computed in batches, cached for the reference.

The reference model is the model that training starts from.  It is asked once for each data set, before the first update
and in eval mode; afterwards only its numbers are used.  They are kept in a file with digests of the weights and the
tokens, and computed anew where either differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shapo.checked import checked
from shapo.data.pairs import PreferencePair
from shapo.data.tokens import Encoded, PairEncoder, warn_of_cuts
from shapo.errors import UserError
from shapo.models.fused_head import FusedHead, find_fused_head, unusable
from shapo.models.modes import evaluating
from shapo.models.wrappers import unwrap
from shapo.ranks import ALONE, Ranks
from shapo.storage.caches import load_cached, save_cached
from shapo.storage.fingerprint import digest_rows
from shapo_kernels import losses

LOGPS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of B pairs and their numbers of response tokens, each `[B]`."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def __getitem__(self, indices: Sequence[int] | Tensor) -> PairLogps:
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.chosen.device)
        return PairLogps(*(value[index] for value in self.tensors().values()))

    def to(self, device: torch.device) -> PairLogps:
        return PairLogps(*(value.to(device) for value in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by name, in the order of the constructor."""
        return {name: getattr(self, name) for name in LOGPS}


class TokenizedPairs:
    """The tokens of preference pairs, ready to be batched.

    Args:
        pairs: The pairs, in the order that indices refer to.
        encoder: The template and truncation that probe, training and evaluation share.

    Raises:
        UserError: There are no pairs.
    """

    def __init__(self, pairs: Sequence[PreferencePair], encoder: PairEncoder) -> None:
        if not len(pairs):
            raise UserError("there are no preference pairs to work on")
        self.pairs = list(pairs)
        self._encoder = encoder
        encoded = encoder.encode_pairs((pair.prompt, pair.chosen, pair.rejected) for pair in self.pairs)
        self.chosen = [chosen for chosen, _ in encoded]
        self.rejected = [rejected for _, rejected in encoded]
        warn_of_cuts([*self.chosen, *self.rejected], encoder.max_length)
        self.flipped = torch.tensor([pair.flipped for pair in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def subset(self, indices: Sequence[int]) -> TokenizedPairs:
        """Some of the pairs, without tokenising again."""
        chosen = copy(self)
        chosen.pairs = [self.pairs[index] for index in indices]
        chosen.chosen = [self.chosen[index] for index in indices]
        chosen.rejected = [self.rejected[index] for index in indices]
        chosen.flipped = self.flipped[list(indices)]
        return chosen

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The chosen responses of `indices`, then the rejected ones: tensors `[2 B, T]`."""
        rows = [self.chosen[index] for index in indices] + [self.rejected[index] for index in indices]
        return {name: value.to(device) for name, value in self._encoder.collate(rows).items()}

    def chosen_tokens(self, indices: Iterable[int]) -> int:
        """Tokens of the chosen responses of `indices` that have a log-probability: not one at position 0."""
        return sum(len(row) - max(row.prompt_length, 1) for row in (self.chosen[index] for index in indices))

    def response_tokens(self, indices: Iterable[int]) -> list[int]:
        """Of each pair, the tokens of both responses that have a log-probability."""
        both = ((self.chosen[index], self.rejected[index]) for index in indices)
        return [sum(len(row) - max(row.prompt_length, 1) for row in pair) for pair in both]

    def length(self, index: int) -> int:
        """Tokens of the longer response with its prompt."""
        return max(len(self.chosen[index]), len(self.rejected[index]))

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens of some pairs: both responses, each with its prompt."""
        return sum(len(self.chosen[index]) + len(self.rejected[index]) for index in indices)

    def digest(self) -> str:
        """Changes with any token, prompt boundary, label or the order."""
        return digest_rows((_key(c), _key(r)) for c, r in zip(self.chosen, self.rejected, strict=True))


@checked
def batch_logps(
    model: torch.nn.Module, batch: dict[str, Tensor], *, bf16: bool = False, head: FusedHead | None = None
) -> PairLogps:
    """One forward pass over a batch of `TokenizedPairs.batch`; gradients flow to the model."""
    return _pairs(*response_logps(model, batch, bf16=bf16, head=head))


def response_logps(
    model: torch.nn.Module, batch: dict[str, Tensor], *, bf16: bool, head: FusedHead | None
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities and numbers of tokens of `labels`, without the model's logits where `head` serves it."""
    with _computing(batch, bf16):
        if head is not None and unusable(unwrap(model, for_calls=True)) is None:
            return head.sequence_logps(model, batch["labels"], **_inputs(batch))
        logits = model(**_inputs(batch)).logits
    return losses.sequence_logps(logits, batch["labels"])


@checked
def batch_loss(
    model: torch.nn.Module,
    batch: dict[str, Tensor],
    share: Callable[[PairLogps], Tensor],
    *,
    bf16: bool,
    head: FusedHead,
) -> tuple[Tensor, PairLogps]:
    """The sum of `share` over the pairs of a batch, given some of them at a time in their order, and their numbers
    without a gradient. With logits that are cut into parts it saves one product of the head's four: see
    `losses.linear_preference_loss`. For a head that is trained and `usable_by_pairs`.
    """
    with _computing(batch, bf16):
        loss, *numbers = head.preference_loss(
            model, batch["labels"], lambda sums, counts, _: share(_pairs(sums, counts)), **_inputs(batch)
        )
    return loss, _pairs(*numbers)


@checked
def usable_by_pairs(
    model: torch.nn.Module, head: FusedHead | None, tokens: Sequence[int], *, bf16: bool = False
) -> bool:
    """Whether `batch_loss` serves a model at this moment and saves a product, given each pair's labelled tokens.

    A frozen head takes two products anyway. The gradient of a 16-bit weight would be kept in fp32 through the backward
    pass, which is more memory than `shapo plan` and the other form count.
    """
    inner = unwrap(model, for_calls=True)
    if head is None or unusable(inner) is not None:
        return False
    weight = head.options(inner)["weight"]
    dtype = torch.bfloat16 if bf16 else weight.dtype
    kept_as_it_is = weight.requires_grad and weight.dtype in (torch.float32, torch.float64)
    return kept_as_it_is and losses.saves_a_product(tokens, weight, dtype=dtype)


def _computing(batch: dict[str, Tensor], bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(batch["input_ids"].device.type, torch.bfloat16) if bf16 else nullcontext()


def _inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}


def _pairs(sums: Tensor, counts: Tensor) -> PairLogps:
    """Of a batch whose chosen responses come first, then the rejected ones."""
    half = len(sums) // 2
    return PairLogps(sums[:half], sums[half:], counts[:half], counts[half:])


@checked
def compute_logps(
    model: torch.nn.Module,
    data: TokenizedPairs,
    *,
    batch_size: int = 16,
    bf16: bool = False,
    fused_head: str = "auto",
    progress: bool = True,
    description: str = "log-probabilities",
    ranks: Ranks = ALONE,
) -> PairLogps:
    """Log-probabilities of every pair in eval mode, without gradients, on the CPU in the order of `data`.

    Several `ranks` compute them between them, each `batch_size` pairs at once, and all have the result.

    Raises:
        UserError: One is NaN or infinite: the model's doing, as tokens are numbers by now.
    """
    device = next(model.parameters()).device
    head = find_fused_head(model, fused_head)
    # Neighbours in length share a batch, so that little is spent on padding.
    order = sorted(range(len(data)), key=data.length)
    parts: list[list[Tensor]] = []
    done: list[int] = []
    with (
        evaluating(model),
        torch.no_grad(),
        tqdm(total=len(data), desc=description, disable=not progress, unit="pair") as bar,
    ):
        for start in range(0, len(order), ranks.count * batch_size):
            indices = order[start : start + ranks.count * batch_size]
            # Every rank runs every pass, as sharded models want it: where none is left for it, over the first pair.
            own = [indices[i] for i in ranks.share(len(indices))]
            logps = batch_logps(model, data.batch(own or indices[:1], device), bf16=bf16, head=head)
            parts.append([values[: len(own)].cpu() for values in logps.tensors().values()])
            done += own
            bar.update(len(indices))
    columns = zip(*parts, strict=True)
    found = PairLogps(*(ranks.spread(torch.cat(column), done, len(order)) for column in columns))
    broken = (~(found.chosen.isfinite() & found.rejected.isfinite())).nonzero()[:, 0]
    if len(broken):
        raise UserError(
            f"the model's log-probabilities of {len(broken)} of {len(data)} pairs are NaN or infinite, first of pair "
            f"{int(broken[0]) + 1}; it has diverged, or computes in too few bits"
        )
    return found


def cached_logps(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    data: TokenizedPairs,
    *,
    model_digest: str,
    bf16: bool,
    fused_head: str,
    ranks: Ranks = ALONE,
    **options: Any,
) -> PairLogps:
    """`compute_logps`, or what an earlier call wrote to `path` from the same weights, tokens, precision and head."""
    precision = "bf16" if bf16 else "full"
    key = {"model": model_digest, "data": data.digest(), "precision": precision, "fused_head": fused_head}
    found = ranks.on_main(lambda: load_cached(path, key, LOGPS, len(data)))
    if found is not None:
        return PairLogps(**found)
    values = compute_logps(model, data, bf16=bf16, fused_head=fused_head, ranks=ranks, **options)
    ranks.on_main(lambda: save_cached(path, key, values.tensors()))
    return values


def _key(encoded: Encoded) -> list[Any]:
    return [encoded.prompt_length, *encoded.input_ids]
