"""Statistics of the last perturbation, kept on the device until they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import warn

#: Below this cosine between intended and realised perturbation most of its length no longer points where it should.
COSINE_WARNING = 0.9


class UpdateStats:
    """Norms of the last perturbation, a counter of skipped ones, and one warning where eps is lost to rounding."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._skipped: Tensor | int = 0
        self._warned = False
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def record(self, squared_norms: Tensor, scale: Tensor, realised: Tensor) -> Tensor:
        """Stores the operators' results: sums only, without waiting for the device.

        Args:
            squared_norms: ||g_l||^2, `[n]`.
            scale: s_l, `[n]`.
            realised: `[n, 3]` of :func:`shapo_kernels.ops.perturb_`.

        Returns:
            Whether the direction's norm is finite, a bool on the device.
        """
        total = squared_norms.sum()
        epsilon = torch.where(scale == 0, 0.0, scale.square() * squared_norms).sum()
        self._sums = torch.cat([torch.stack([total, epsilon]), realised.sum(0)])
        finite = total.isfinite()
        self._skipped = self._skipped + (~finite).long()
        if not self._warned:
            self._watch(self._sums)
        return finite

    def read(self) -> dict[str, float]:
        """Floats; waits for the device. See `ShaPOOptimizer.stats` for their meaning."""
        sums = [0.0] * 5 if self._sums is None else self._sums.tolist()
        grad, epsilon, realised, dot, weight = sums
        return {
            "grad_norm": grad**0.5,
            "epsilon_norm": epsilon**0.5,
            "weight_norm": weight**0.5,
            "relative_radius": (epsilon / weight) ** 0.5 if weight else 0.0,
            "realised_norm": realised**0.5,
            "realised_cosine": _cosine(epsilon, realised, dot),
            "skipped": int(self._skipped),
        }

    def state(self) -> dict[str, int]:
        return {"skipped": int(self._skipped)}

    def load(self, state: dict[str, int]) -> None:
        self._skipped = int(state["skipped"])

    def _watch(self, sums: Tensor) -> None:
        if sums.device.type == "cpu":
            self._warn_if_lost(sums)
        elif sums.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            # Copied asynchronously and read in a later update: a warning must not cost a synchronisation.
            if self._pending is not None and self._pending[1].query():
                self._warn_if_lost(self._pending[0])
                self._pending = None
            if self._pending is None:
                host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
                host.copy_(sums, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._pending = (host, event)

    def _warn_if_lost(self, sums: Tensor) -> None:
        _, epsilon, realised, dot, _ = sums.tolist()
        if not epsilon > 0:
            return
        cosine = _cosine(epsilon, realised, dot)
        if not cosine >= COSINE_WARNING:
            self._warned = True
            share = (realised / epsilon) ** 0.5
            warn(
                f"the perturbation is lost to rounding: what reaches the forward pass has cosine {cosine:.2f} with the "
                f"intended eps and {share:.2f} of its norm; use perturbation='delta', or a larger rho"
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pending": None}


def _cosine(epsilon: float, realised: float, dot: float) -> float:
    """NaN where nothing was intended, 0 where nothing of it was realised."""
    if not epsilon > 0:
        return float("nan")
    return dot / (epsilon * realised) ** 0.5 if realised > 0 else 0.0
