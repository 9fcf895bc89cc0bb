"""What the C library does with freed memory: on a CPU, keep it for the next pass."""

from __future__ import annotations

import ctypes
import os

OFF = "SHAPO_RETURN_MEMORY"

# malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed, for this process; returns whether it does.

    By default glibc maps each large block anew and hands it back to the kernel when it is freed, so that every pass
    over a model begins with page faults on memory that the last pass had. The cost of keeping it: the process stays as
    large as it has been at its largest. The environment variable `SHAPO_RETURN_MEMORY=1` leaves everything as it is, as
    does a setting of one's own (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`) or another allocator.
    """
    own = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
    if os.environ.get(OFF, "0") != "0" or any(name in os.environ for name in own):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))
