"""Batches prepared ahead of their use, by the worker processes of a DataLoader."""

from __future__ import annotations

import atexit
import ctypes
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler

import torch
from torch.utils.data import DataLoader

from components.errors import STOP_SIGNALS

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


def prefetch(make: Callable, items: Sequence, workers: int, pin: bool = False) -> Iterator:
    """Yield make(item) for every item, in order. Each of `workers` forked processes works up to two items ahead.

    Without workers, and on systems other than Linux, make(item) is called here when it is asked for. pin: copy tensors
    to pinned memory. `make` must leave a GPU alone. Workers do not touch the random number generators of this process.
    """
    options = {"batch_size": None, "collate_fn": make, "pin_memory": pin, "generator": torch.Generator()}
    workers = min(workers, len(items)) if sys.platform == "linux" else 0
    if workers:
        options |= {"num_workers": workers, "multiprocessing_context": "fork", "worker_init_fn": init_worker}
    # Workers inherit the blocked signals: the parent finishes its step after a signal to the whole process group.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        iterator = iter(DataLoader(items, **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if not workers:
        yield from iterator
        return
    # At exit multiprocessing sends workers SIGTERM and waits for them, forever since they block it: they must have
    # ended by then, even if a traceback keeps this generator from being closed.
    end = partial(end_workers, iterator)
    atexit.register(end)
    try:
        yield from iterator
    finally:
        atexit.unregister(end)
        end()


def init_worker(_worker: int) -> None:
    """Make a worker die with its parent and send tensors as bytes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # torch shares each tensor through a file descriptor: receiving a batch of eight would take the parent 3 ms, not 1.
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))


def end_workers(iterator) -> None:
    """Ask the workers of a DataLoader's iterator to end, and kill those that do not within seconds; idempotent."""
    iterator._shutdown_workers()
    while iterator._workers:
        iterator._workers.pop().kill()
