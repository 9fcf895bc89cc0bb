"""The memory that a process has from the C library, whichever thread or library asked for it.

torch's profiler misses what other threads release, as gloo's do.
"""

import ctypes
import gc

from torch.utils._python_dispatch import TorchDispatchMode

_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


_libc = ctypes.CDLL(None)


def allocated():
    """Bytes in use, on the heap and in blocks mapped by themselves. Of glibc from 2.33 on."""
    _libc.mallinfo2.restype = _Mallinfo
    found = _libc.mallinfo2()
    return found.uordblks + found.hblkhd


class Peak(TorchDispatchMode):
    """The most bytes in use after an operation inside `with`, above those `before`."""

    def __init__(self, before):
        super().__init__()
        self._before, self.bytes = before, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, allocated() - self._before)
        return out


def peak_bytes(make):
    """The most memory in use during a call of what `make()` returns, with everything that `make` has left."""
    gc.collect()
    before = allocated()
    gc.disable()  # when it runs is chance
    try:
        run = make()
        gc.collect()
        with Peak(before) as peak:
            run()
    finally:
        gc.enable()
    return peak.bytes
