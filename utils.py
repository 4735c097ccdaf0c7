"""The official code's utilities, Config and set_seed, and requests to stop a run."""

from __future__ import annotations

import os
import random
import signal
import time

import torch

from config import Config

__all__ = ["Config", "StopRequest", "set_seed"]


def set_seed(seed: int, rank: int | None = None) -> None:
    """Seeds Python's and torch's generators, on the CPU and every GPU; with a rank, a stream of its own for each."""
    if rank is not None:
        seed = random.Random(f"{seed} {rank}").getrandbits(32)
    random.seed(seed)
    torch.manual_seed(seed)


class StopRequest:
    """SIGTERM and SIGINT as a wish, which the training loop grants at its next step.

    A second signal ends the process at once; but one that follows closely is the same wish, delivered by the
    terminal and by torchrun. Used as a context manager, which restores the handlers that were there.
    """

    SAME_WISH = 2.0  # seconds

    def __init__(self):
        self.signal, self.time = 0, 0.0

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        """The signal handler."""
        if self.signal and time.monotonic() - self.time > self.SAME_WISH:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
