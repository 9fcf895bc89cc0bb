"""Log-probabilities of labels in plain PyTorch; documented in :mod:`shapo_kernels.ops.sequence_logps`.

Works on some tokens at a time, so that no second tensor of the logits' size is made. Reads nothing back from the
device: ignored tokens are computed and masked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 64 MiB in float32: large enough to keep a GPU busy, small beside the logits of a batch.
CHUNK_ELEMENTS = 1 << 24


def token_logps(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: int, first: int, vocabulary: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    targets = _targets(labels, ignore_index, shift)
    logps = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    normalizers = torch.zeros((2, *labels.shape), dtype=dtype, device=logits.device)
    entropies = torch.zeros((len(labels) if entropy else 0, labels.shape[1]), dtype=dtype, device=logits.device)
    for part in _parts(logits):
        x = logits[part].to(dtype)
        highest = x.amax(-1)
        below = x - _finite_or_zero(highest)[..., None]
        exponentials = below.exp()
        total = exponentials.sum(-1)
        counted, local, held = _locate(targets[part], ignore_index, first, logits.shape[2])
        picked = x.gather(-1, local[..., None])[..., 0]
        logps[part] = torch.where(held, picked - highest - total.log(), 0.0)
        normalizers[0][part] = torch.where(counted, highest, 0.0)
        normalizers[1][part] = torch.where(counted, total, 1.0)
        if entropy:
            spread = total.log() - torch.where(exponentials == 0, 0.0, exponentials * below).sum(-1) / total
            entropies[part] = torch.where(counted, spread, 0.0)
    return logps, normalizers, entropies


def token_logps_gradient(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    ignore_index: int,
    shift: int,
    first: int,
) -> Tensor:
    slopes = torch.empty_like(logits)
    _put_gradient(logits, slopes, labels, logps, normalizers, grad, ignore_index, shift, first)
    return slopes


def token_logps_gradient_(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    ignore_index: int,
    shift: int,
    first: int,
) -> None:
    _put_gradient(logits, logits, labels, logps, normalizers, grad, ignore_index, shift, first)


def _put_gradient(
    logits: Tensor,
    to: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    ignore_index: int,
    shift: int,
    first: int,
) -> None:
    """`to` may be the logits themselves."""
    targets = _targets(labels, ignore_index, shift)
    for part in _parts(logits):
        counted, local, held = _locate(targets[part], ignore_index, first, logits.shape[2])
        highest, total = normalizers[0][part], normalizers[1][part]
        slope = (logits[part].to(grad.dtype) - highest[..., None]).exp_().mul_((-grad[part] / total)[..., None])
        # 1 - p without cancellation where p is close to 1.
        at_label = torch.where(held, -grad[part] * logps[part].expm1(), slope.gather(-1, local[..., None])[..., 0])
        slope.scatter_(-1, local[..., None], at_label[..., None])
        to[part] = slope.masked_fill_(~counted[..., None], 0.0).to(to.dtype)


def _targets(labels: Tensor, ignore_index: int, shift: int) -> Tensor:
    """`[B, T]`: at each position the label that its logits are to predict; nothing at the last `shift`."""
    nothing = labels.new_full((labels.shape[0], min(shift, labels.shape[1])), ignore_index)
    return torch.cat([labels[:, shift:], nothing], 1)


def _locate(targets: Tensor, ignore_index: int, first: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens count, where their label lies among these logits, and whether it lies there at all."""
    counted, local = targets != ignore_index, targets - first
    return counted, local.clamp(0, vocabulary - 1), counted & (local >= 0) & (local < vocabulary)


def _finite_or_zero(highest: Tensor) -> Tensor:
    """What to subtract: nothing from a part of a vocabulary that is masked as a whole."""
    return torch.where(highest == -torch.inf, 0.0, highest)


def _parts(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    rows, length, vocabulary = logits.shape
    if not logits.numel():
        return
    tokens = max(1, CHUNK_ELEMENTS // vocabulary)
    together = max(1, tokens // length)
    for row in range(0, rows, together):
        for token in range(0, length, min(tokens, length)):
            yield slice(row, row + together), slice(token, token + min(tokens, length))
