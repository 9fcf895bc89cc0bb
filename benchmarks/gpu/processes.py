"""Runs a function in a process and session of its own: what it breaks or leaves running costs nobody else."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_apart(function: Callable[[], None], limit: float, log: Path) -> str | None:
    """Call `function` in a child that is ended with all its descendants after `limit` seconds.

    Its output is appended to `log`. It is forked, so that what the parent has imported is there already: the parent
    must not have touched CUDA, and a child's broken CUDA context dies with it.

    Returns:
        `None` where it returned, else a line that says why not.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(function, log, sender))
    child.start()
    sender.close()
    assert child.pid is not None
    child.join(limit)
    late = child.is_alive()
    # The whole group, also after a child that ended well: compilers' workers outlive it, a sanitizer's target too.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    if late:
        child.kill()
    child.join()
    reason = None
    with contextlib.suppress(EOFError):
        if receiver.poll():
            reason = receiver.recv()
    if late:
        return f"ended after {limit:.0f} s"
    if reason is None and child.exitcode:
        return f"ended by signal {-child.exitcode}" if child.exitcode < 0 else f"exit code {child.exitcode}"
    return reason


def _child(function: Callable[[], None], log: Path, sender: multiprocessing.connection.Connection) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "a", buffering=1)
    try:
        function()
    except BaseException as error:
        traceback.print_exc()
        sender.send((f"{type(error).__name__}: {error}".splitlines() or [""])[0][:400])
        sys.exit(1)
    finally:
        sys.stdout.flush()
