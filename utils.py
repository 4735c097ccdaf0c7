"""Small things that everyone uses: what a save or a signal may do to a run, seeding, and writing files."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from config import Config, UserError

__all__ = ["Config", "Interrupted", "SaveError", "StopRequest", "saving", "set_seed", "write_text"]  # Config: official


class SaveError(Exception):
    """Something of a run could not be written; every earlier checkpoint is as it was."""


class Interrupted(Exception):
    """A signal asked the run to stop; all processes raise it together."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns what goes wrong while something is written (a full, read-only or failing disk) into a SaveError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # besides OSError, the libraries have errors of their own for a full disk
        advice = "earlier checkpoints are as they were; make room, and the same command continues the run"
        raise SaveError(f"{path} could not be written: {error}; {advice}") from error


def set_seed(seed: int, rank: int | None = None) -> None:
    """Seeds Python's and torch's generators, on the CPU and every GPU; with a rank, a stream of its own for each."""
    if rank is not None:
        seed = random.Random(f"{seed} {rank}").getrandbits(32)
    random.seed(seed)
    torch.manual_seed(seed)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file in one atomic step: a reader, or a crash, finds the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


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
