"""Ctrl-C during training: finish the update, save, and leave; a second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SAME = 3.0


class Interruptible:
    """While entered, the first SIGINT only sets `.requested`; the second raises KeyboardInterrupt where the program is.

    Outside the main thread, where Python cannot install handlers, it does nothing.

    Args:
        launched: A launcher sends on the SIGINT that the terminal has sent already, so one that follows within
            `_SAME` seconds is the same.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.requested = False
        self._launched, self._at = launched, 0.0
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous or signal.default_int_handler)
            self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and not (self._launched and now - self._at < _SAME):
            raise KeyboardInterrupt
        self.requested, self._at = True, now
