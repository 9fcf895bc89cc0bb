"""The exceptions that more than one module raises, and warnings at the user's own line."""

from __future__ import annotations

import sys
import warnings

# Frames of this library, and of the decorators and contexts that stand between it and its user.
_SEEN_THROUGH = ("shapo_kernels", "shapo", "torch", "contextlib")


class SubspaceError(ValueError):
    """A subspace that is malformed, or that does not fit the model or the options it is used with."""


class UnsupportedLayout(SubspaceError):
    """A weight's sharding cannot be read. The message says why and what to do."""


def warn(message: str) -> None:
    """A UserWarning whose place is the line that called this library, not one inside it."""
    frame, level = sys._getframe().f_back, 2
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _SEEN_THROUGH:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
