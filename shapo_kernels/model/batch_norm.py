"""Batch normalisation in two passes: its running statistics must count a batch once (davda54/sam#17, #30)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_STATISTICS = ("running_mean", "running_var")


@contextlib.contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, batch and instance norms in training mode normalise by the batch as before, but update neither their
    running statistics nor their count of batches.

    Put it around one of the two passes, best the descent, since theta is evaluated later and not theta + eps::

        with opt.perturbed(), sk.frozen_batch_norm(model):
            ...

    In a closure, which is called in both passes, `opt.is_perturbed` tells which one it is.

    Args:
        model: every batch and instance norm in it is frozen.
    """
    # Not momentum = 0: num_batches_tracked would still count the batch, and a cumulative average divides by it.
    counting = [m for m in model.modules() if getattr(m, "track_running_stats", False) and m.training]
    batch_norms: list[Any] = [norm for norm in counting if isinstance(norm, _BATCH_NORMS)]
    # These read their buffers whatever track_running_stats says.
    instance_norms: list[Any] = [norm for norm in counting if isinstance(norm, _INSTANCE_NORMS)]
    statistics = [{name: norm._buffers[name] for name in _STATISTICS} for norm in instance_norms]
    try:
        for norm in batch_norms:
            norm.track_running_stats = False
        for norm in instance_norms:
            norm._buffers.update(dict.fromkeys(_STATISTICS))
        yield
    finally:
        for norm in batch_norms:
            norm.track_running_stats = True
        for norm, buffers in zip(instance_norms, statistics, strict=True):
            norm._buffers.update(buffers)
