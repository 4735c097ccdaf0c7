"""The processes of a run: the process group, its collectives, and what is said when one is lost."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from config import UserError

# For how long processes wait for one that does not answer, before they give up. More than the longest save takes.
TIMEOUT = timedelta(minutes=30)

HANG_WARNING = timedelta(minutes=10)  # without an exchange, after which a process says where it stands

VISIBILITY_TIMEOUT = 60  # seconds within which all see on a shared file system what the main process wrote

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its global rank, their number, its device, and its rank on its node."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_rank: int = 0

    @property
    def is_rank0(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def print(self, *words) -> None:
        """print, on the main process only."""
        if self.is_rank0:
            print(*words, flush=True)

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sums of a short list of numbers over all processes (in float64)."""
        return self.reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """The element-wise maxima of a short list of numbers over all processes."""
        return self.reduce(values, dist.ReduceOp.MAX)

    def reduce(self, values: list[float], operation) -> list[float]:
        """The numbers reduced over all processes."""
        if self.world_size == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)  # (len(values),)
        dist.all_reduce(reduced, operation)
        return reduced.tolist()

    def table(self, values: Tensor, numbers: list[float]) -> list[list[float]]:
        """A row for each of the given values (n,) and numbers, with what every process has there, in rank order."""
        mine = torch.cat([values.double(), torch.tensor(numbers, dtype=torch.float64).to(values.device)])
        if self.world_size == 1:
            return [[value] for value in mine.tolist()]
        everyone = mine.new_empty(self.world_size, len(mine))
        dist.all_gather(list(everyone), mine)
        return everyone.T.tolist()

    def gather(self, value) -> list:
        """Every process's value (anything that pickles), in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def run_on_rank0(self, function: Callable):
        """What a function returns on the main process, which alone calls it, for all; what it raises, all raise."""
        outcome = tried(function) if self.is_rank0 else (None, None)
        if self.world_size == 1:
            return result_of(*outcome)
        message = [outcome]
        dist.broadcast_object_list(message, src=0)
        return result_of(*(outcome if self.is_rank0 else message[0]))  # the original error has the traceback

    def run_on_each_node(self, function: Callable):
        """What a function returns on this node's first process, the one there to call it; what it raises, all raise."""
        result = self.run_on_all_ranks(function if self.local_rank == 0 else lambda: None)
        return self.gather(result)[self.rank - self.local_rank]

    def run_on_all_ranks(self, function: Callable):
        """What a function returns here, while every process calls it; what one of them raises, all raise."""
        result, error = tried(function)
        errors = [other for other in self.gather(error) if other is not None]
        return result_of(result, error or next(iter(errors), None))


def tried(function: Callable) -> tuple:
    """What a function returns and None, or None and what it raises."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def result_of(result, error: Exception | None):
    """The reverse of `tried`."""
    if error is not None:
        raise error
    return result


def init_distributed() -> Processes:
    """Joins the processes that torchrun started (nccl on CUDA, gloo on CPU); a single process needs no group."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"{here} processes for {gpus} GPU(s); lower --nproc_per_node to {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # Attention by cuDNN plans anew for every shape (about 0.4 s), and here every pass has one of its own.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore(store_prefix(), next(dist.rendezvous("env://", timeout=TIMEOUT))[0])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        threading.Thread(target=watch, args=(rank, threading.get_ident()), daemon=True).start()
    return Processes(rank, world_size, device, local_rank)


def watch(rank: int, thread: int) -> None:
    """Says, for as long as this process lives, where its thread stands whenever nothing is exchanged for a while.

    So of processes that wait for one that hangs, and of that one, everybody knows where.
    """
    before = None
    while dist.is_initialized():
        exchanges = dist.group.WORLD._get_sequence_number_for_group()
        if exchanges == before and (frame := sys._current_frames().get(thread)):
            place = places(traceback.extract_stack(frame))
            since = f"has exchanged nothing for {HANG_WARNING.total_seconds():g} s; it stands in {place}"
            print(f"warning: {name_of(rank)} {since}", file=sys.stderr, flush=True)
        before = exchanges
        time.sleep(HANG_WARNING.total_seconds())


def places(frames: traceback.StackSummary) -> str:
    """The functions of this program in a stack, the outermost first."""
    own = [
        frame
        for frame in frames
        if Path(frame.filename).parent in (ROOT, ROOT / "components") and not frame.name.startswith("<")
    ]
    return " > ".join(frame.name for frame in own)


def name_of(rank: int) -> str:
    """A process as messages name it."""
    return f"rank {rank} on {socket.gethostname()}"


def is_lost_peer(error: Exception) -> bool:
    """Whether an error says that another process has ended or does not answer; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def check_shared_filesystem(path: Path, processes: Processes) -> None:
    """Waits until every process reads in a text file what the main one does; else all raise the UserError of one.

    Others may see late what one process has written and renamed, and never where a file system is not shared.
    """
    text = processes.run_on_rank0(lambda: path.read_text(encoding="utf-8"))
    processes.run_on_all_ranks(lambda: wait_for(path, text, processes.rank))


def wait_for(path: Path, text: str, rank: int) -> None:
    """Waits until a file holds a text. Raises UserError if it does not come."""
    end, found = time.monotonic() + VISIBILITY_TIMEOUT, None
    while found != text:
        if time.monotonic() > end:
            what = "is not there" if found is None else "is another"
            advice = "save_path must be a folder that all nodes share"
            waited = f"{name_of(rank)} waited {VISIBILITY_TIMEOUT} s for {path} as rank 0 has it, but there it {what}"
            raise UserError(f"save_path: {waited}; {advice}")
        with suppress(OSError):
            found = path.read_text(encoding="utf-8")
        if found != text:
            time.sleep(0.1)


def store_prefix() -> str:
    """A name for this start of the processes, under which they find each other.

    Workers that torchrun restarts share a store with their dead forerunners, whose addresses they must not take. The
    agents of several nodes count restarts each for itself, so a name there is the same for all: docs/fault_tolerance.md tells
    how to get a store for each store_prefix.
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if one_node else 0}"


def destroy_distributed() -> None:
    """Leaves the process group, if there is one; for an orderly end only, since the processes wait for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()
