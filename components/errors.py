"""Exceptions that end a run, their exit codes, and what the user is told about them."""

from __future__ import annotations

import os
import re
import signal
import socket
import textwrap
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from config import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # after which a run saves and stops
PROJECT = Path(__file__).parents[1]
TRAINING_MEMORY_ADVICE = (
    "halve batch_size_training and double gradient_accumulation_steps, which makes the same steps, or set "
    "gradient_checkpointing: block, or parallel: fsdp on several GPUs"
)
VALIDATION_MEMORY_ADVICE = "lower batch_size_eval (it defaults to batch_size_training) or max_new_tokens"


class SaveError(Exception):
    """A file of the run could not be written; earlier checkpoints are intact."""


class NotFiniteError(Exception):
    """The loss or the gradient norm is not finite; raised before the weights change."""


class Interrupted(Exception):
    """A signal asked the run to stop; raised on all ranks together."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


def exit_code(error: Exception) -> int | None:
    """Return the exit code of run.py for an error; None for a bug, whose traceback is the message."""
    codes = {UserError: 2, NotFiniteError: 3, SaveError: 4, torch.OutOfMemoryError: 5}
    if isinstance(error, Interrupted):
        return 128 + error.signal
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 6 if is_lost_peer(error) else None)


def is_lost_peer(error: Exception) -> bool:
    """Return whether an error says that another rank died or does not answer; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def message(error: Exception) -> str | None:
    """Return what this rank prints about an error, None where another rank of the node prints the same."""
    if isinstance(error, torch.OutOfMemoryError):
        advice = " ".join(getattr(error, "__notes__", [TRAINING_MEMORY_ADVICE]))
        resume = "Checkpoints are intact; a training run resumes from its newest one with the same command"
        return f"out of GPU memory: {location(error)}; {advice}. {resume}"
    if is_lost_peer(error):
        return f"lost another rank, see its own message: {location(error)}; earlier checkpoints are intact"
    return str(error) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None


def reason(error: Exception) -> str:
    """Return what a library's error says on one line, without terminal colours, in at most 600 characters."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or type(error).__name__
    return textwrap.shorten(text, 600, placeholder=" ...")


def location(error: Exception) -> str:
    """Return the rank and the functions in which an error was raised, and its first line."""
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return f"{rank_name()} in {call_stack(traceback.extract_tb(error.__traceback__))}: {first_line}"


def rank_name() -> str:
    """Return this process's name in messages, such as "rank 3 on node-1"."""
    return f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"


def call_stack(frames: traceback.StackSummary) -> str:
    """Return the names of this project's functions in a stack, outermost first."""
    own = [f for f in frames if Path(f.filename).is_relative_to(PROJECT) and "site-packages" not in f.filename]
    return " > ".join(frame.name for frame in own if not frame.name.startswith("<"))
