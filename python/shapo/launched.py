"""A command as one of the ranks that torchrun or `accelerate launch` has started: who speaks, and how all end together.

Rank 0 prints. Of an end that is none of success one rank tells, the first that meets it, in the one line that one
process prints; the launcher then ends the others, and adds its own report. A rank that is killed says nothing: the one
that misses it first does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from shapo.errors import UserError
from shapo.ranks import Ranks, launched

COMMANDS = ("sft", "train", "probe", "select", "evaluate")

INTERRUPTED = 130

LOST = "another rank was lost, or ended from outside; what was saved is whole, and --resume of sft and train goes on"

# Rank 0 scores and writes while the others wait; whoever dies meanwhile is missed by the launcher, not by a time limit.
_TIMEOUT = timedelta(hours=24)
_WAIT = 5.0


class Launch:
    """This process as a launcher started it; without one, a process that speaks for itself.

    Attributes:
        stderr: Where the line of an end goes; other ranks than 0 print nowhere else.
    """

    def __init__(self) -> None:
        self.count, self.stderr = launched(), sys.stderr
        self._is_main = self.count == 1 or os.environ["RANK"] == "0"
        self._store: Any = None
        if not self._is_main:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)

    def join(self, command: str, device: str) -> Ranks:
        """Joins the ranks; from now on an end of one is an end of all.

        Raises:
            UserError: A command for one process, or a device that is one for all.
        """
        if self.count == 1:
            return Ranks.here()
        if command not in COMMANDS:
            raise UserError(f"shapo {command} runs in one process: start it without the launcher")
        if ":" in device:
            raise UserError(f"the launcher gives each rank a device of its own: leave --device {device} out")
        import torch
        import torch.distributed as dist

        from shapo.libraries.accelerate import join

        join(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_TIMEOUT)
        with suppress(RuntimeError, KeyError):  # without one rank 0 speaks
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=3))
            self._store = dist.PrefixStore(f"shapo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._end_at_once_on_sigterm()
        return Ranks.here()

    def speaks(self) -> bool:
        """Whether this process is the one that tells of an end. To be asked once, before the line is printed."""
        if self.count == 1:
            return True
        if self._store is None:
            if not self._is_main:
                time.sleep(_WAIT)  # for rank 0 to meet the same, and for the launcher to end this one
            return True
        try:
            return int(self._store.add("ended", 1)) == 1
        except RuntimeError:
            return self._is_main

    def end(self, code: int) -> int:
        """The exit code. A rank leaves here: the interpreter's end would wait for connections that are gone."""
        if self.count > 1:
            if code == INTERRUPTED and self._store is not None:
                self._after_rank_0()
            for stream in (sys.stdout, sys.stderr, self.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)
        return code

    def _after_rank_0(self) -> None:
        """The launcher ends all ranks when one has left, and rank 0 may have trackers to finish."""
        with suppress(RuntimeError):
            if self._is_main:
                self._store.set("left", "yes")
            else:
                self._store.wait(["left"], timedelta(seconds=_WAIT))

    def _end_at_once_on_sigterm(self) -> None:
        """A rank in a collective runs no Python, so a handler would come too late: a thread hears of the signal."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

        def listen() -> None:
            while signal.SIGTERM not in os.read(reading, 1):
                pass
            if self.speaks():
                print(f"shapo: error: {LOST}", file=self.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)

        threading.Thread(target=listen, daemon=True).start()
