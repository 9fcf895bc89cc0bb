"""Other ways to the log-probabilities that ours are held against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

IGNORE = -100


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """log_softmax in float32 and gather, as trainers do."""
    targets = labels[:, 1:]
    logps = torch.log_softmax(logits[:, :-1], -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    picked = logps.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets != IGNORE, picked, 0.0).sum(1)


def peers(
    hidden: Tensor, weight: Tensor, labels: Tensor, dpo: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Other libraries' ways to the same loss, of those that are installed and serve this device."""
    found: dict[str, Callable[[], Tensor]] = {}
    shifted, targets = hidden[:, :-1], labels[:, 1:].contiguous()
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        # By default it takes so few tokens at once on a CPU that a step takes minutes.
        quarter = {"batch_chunk_size": -(-targets.numel() // 4), "chunking_method": None}
        chunked = torch.nn.LinearCrossEntropyOptions(**({} if hidden.is_cuda else quarter))
        found["torch, chunked linear_cross_entropy"] = lambda: dpo(
            -torch.nn.functional.linear_cross_entropy(
                shifted.flatten(0, 1), weight, targets.flatten(), reduction="none", options=chunked
            )
            .view_as(targets)
            .sum(1)
        )
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        # A chunk of it is a pair, by default; its gradients come out in the forward pass.
        liger = LigerFusedLinearDPOLoss(beta=0.1, compute_nll_loss=False, use_ref_model=False)
        found["Liger, chunked DPO"] = lambda: liger(weight, shifted, targets)[0]
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        way = {"impl": "cce", "filter_eps": None} if hidden.is_cuda else {"impl": "torch_compile"}
        found["cut-cross-entropy"] = lambda: dpo(
            -linear_cross_entropy(shifted, weight, targets, reduction="none", **way).sum(1)
        )
    return found
