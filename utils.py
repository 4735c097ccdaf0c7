"""The official code's utilities, Config and set_seed, and requests to stop a run."""

from __future__ import annotations

import os
import random
import signal
import time

import torch

from components.distributed import Processes
from components.errors import STOP_SIGNALS, Interrupted
from config import Config

__all__ = ["Config", "StopRequest", "set_seed"]


def set_seed(seed: int, rank: int | None = None) -> None:
    """Seed Python's and torch's generators, on the CPU and every GPU; with a rank, differently on each."""
    if rank is not None:
        seed = random.Random(f"{seed} {rank}").getrandbits(32)
    random.seed(seed)
    torch.manual_seed(seed)


class StopRequest:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 as a request that the training loop honors after its current step.

    A second signal exits at once, unless it follows so closely that it is the same request, delivered by the terminal
    and by torchrun. A SIGHUP that nohup has disabled stays so. A context manager, which restores the previous handlers.
    """

    SAME_REQUEST = 2.0  # seconds

    def __init__(self):
        self.signal, self.time = 0, 0.0

    def __enter__(self) -> StopRequest:
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self.before = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS if number not in ignored}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        """Handle a signal."""
        if self.signal and time.monotonic() - self.time > self.SAME_REQUEST:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()

    def raise_on_all_ranks(self, processes: Processes) -> None:
        """Raise Interrupted on every rank if any of them received a signal."""
        [signal] = processes.all_reduce_max([self.signal])
        if signal:
            raise Interrupted(int(signal))
