"""Worker processes that make things ahead of their use."""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


class Made(Dataset):
    """make(item) for every item."""

    def __init__(self, make: Callable, items: Sequence):
        self.make, self.items = make, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        made = self.make(self.items[index])
        return made if get_worker_info() is None else Parcel(made)


class Parcel:
    """Something made by a worker, which its parent receives in one piece: torch would send a file for every tensor, and
    to receive those of a batch takes the parent as long as to make them."""

    def __init__(self, made):
        content = io.BytesIO()
        TensorPickler(content, pickle.HIGHEST_PROTOCOL).dump(made)
        self.content = content.getvalue()

    def __reduce__(self) -> tuple:
        return pickle.loads, (self.content,)


class TensorPickler(pickle.Pickler):
    """Pickles the numbers of a tensor with the rest."""

    def reducer_override(self, value):
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def prefetch(make: Callable, items: Sequence, workers: int, pin: bool = False) -> Iterator:
    """Yields make(item) for every item, in order; `workers` processes are ahead by two each, none: made when asked for.

    pin: whether tensors are brought to pinned memory, too. The workers are forks, which hold what this process holds
    without a copy of it, must leave a GPU alone, end with this process, however it ends, and leave signals to it. The
    random streams of this process stay as they are.
    """
    if not items:
        return
    workers = min(workers, len(items)) if sys.platform == "linux" else 0
    options = {"multiprocessing_context": "fork", "worker_init_fn": belong_to_parent} if workers else {}
    generator = torch.Generator()  # a DataLoader draws a seed
    loader = DataLoader(
        Made(make, items), batch_size=None, num_workers=workers, pin_memory=pin, generator=generator, **options
    )
    with signals_held():
        iterator = iter(loader)
    yield from iterator


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def signals_held() -> Iterator[None]:
    """Lets the stop signals wait; for good in processes forked meanwhile, since a signal to all is for the parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def belong_to_parent(_worker: int) -> None:
    """Ends this worker with its parent at once, whose files, and locks on them, a fork holds open; and when the parent
    sends SIGTERM, as it does to workers that are left at its end."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
