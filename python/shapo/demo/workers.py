"""Jobs side by side in processes of one thread each, or one after the other in this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from shapo.libraries import quiet_imports

Argument = TypeVar("Argument")
Result = TypeVar("Result")

# A function and its one argument; both must be picklable.
Job = tuple[Callable[[Argument], Result], Argument]
Spread = Callable[[Sequence[Any]], Iterator[Any]]


@contextmanager
def workers(count: int) -> Iterator[Spread]:
    """Yields a function that runs jobs `(function, argument)` and gives their results in the jobs' order, as they come.

    With one worker everything happens in this process.  Leaving by an exception, Ctrl-C among them, ends the processes.
    """
    if count == 1:
        yield lambda jobs: map(_call, jobs)
        return
    # Spawned, not forked: a fork after OpenMP or CUDA has started may hang.
    with multiprocessing.get_context("spawn").Pool(count, _start, (os.getpid(),)) as pool:
        yield lambda jobs: pool.imap(_call, jobs)
        # In good order, so that they clear up after themselves; after an exception the pool terminates them.
        pool.close()
        pool.join()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads for torch's operators inside, as many as before on leaving."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Ctrl-C is for the parent, which ends its workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    quiet_imports()
    # tqdm's own lock is a named semaphore, which a worker that is ended early would leave behind.
    tqdm.set_lock(threading.RLock())


def _end_with(parent: int) -> None:
    """Ends this process when its parent has gone: a parent that is killed cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(job: Job[Argument, Result]) -> Result:
    function, argument = job
    return function(argument)
