"""The processes of a run: their process group, its collectives, and what is reported when one hangs or dies."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from components.errors import call_stack, rank_name
from config import UserError

TIMEOUT = timedelta(minutes=30)  # for a collective
RANK0_TIMEOUT = timedelta(hours=24)  # for what rank 0 does while the others wait, such as a save to a slow disk
HANG_WARNING = timedelta(minutes=10)  # without a collective, after which each rank reports where it is
VISIBILITY_TIMEOUT = 60  # seconds until all nodes must see on a shared filesystem what rank 0 wrote


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its global rank, the world size, its device, and its rank on its node."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_rank: int = 0
    turns: Iterator[int] = field(default_factory=count, repr=False, compare=False)  # of rank 0, that others waited for

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0

    def print(self, *values) -> None:
        """Print on rank 0, above a progress bar."""
        if self.is_rank0:
            with tqdm.external_write_mode(sys.stdout):
                print(*values, flush=True)

    def all_reduce(self, values: list[float], operation: dist.ReduceOp) -> list[float]:
        """Reduce a short list of numbers element-wise over all ranks, in float64."""
        if self.world_size == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)  # (len(values),)
        dist.all_reduce(reduced, operation)
        return reduced.tolist()

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Sum a short list of numbers element-wise over all ranks."""
        return self.all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """Take element-wise maxima of a short list of numbers over all ranks."""
        return self.all_reduce(values, dist.ReduceOp.MAX)

    def all_gather_scalars(self, values: dict[str, Tensor | float]) -> dict[str, list[float]]:
        """Gather named scalars with one collective; returns each name's values in rank order.

        Values are tensors on this rank's device or Python numbers. A GPU is waited for once.
        """
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in values.items() if name not in tensors}
        local = torch.tensor(list(numbers.values()), dtype=torch.float64)  # (numbers,)
        local = local.to(self.device, non_blocking=True)
        local = torch.cat([*(value.double().view(1) for value in tensors.values()), local])  # (len(values),)
        gathered = local.new_empty(self.world_size, len(local))
        if self.world_size == 1:
            gathered[0] = local
        else:
            dist.all_gather(list(gathered), local)
        return dict(zip([*tensors, *numbers], gathered.T.tolist(), strict=True))

    def all_gather_object(self, value) -> list:
        """Gather any picklable value; returns all of them in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def run_on_rank0(self, function: Callable):
        """Call a function on rank 0 and return its result, or raise its error, on every rank.

        The others wait at the store until it is done: in a collective their time would be running out.
        """
        outcome = outcome_of(function) if self.is_rank0 else (None, None)
        if self.world_size > 1:
            store, turn = dist.distributed_c10d._get_default_store(), f"turn {next(self.turns)} of rank 0"
            if self.is_rank0:
                store.set(turn, "done")
            else:
                store.wait([turn], RANK0_TIMEOUT)
            message = [outcome]
            dist.broadcast_object_list(message, src=0)
            outcome = outcome if self.is_rank0 else message[0]  # the original error has the traceback
        return unwrap(*outcome)

    def run_on_each_node(self, function: Callable):
        """Call a function on the first rank of each node and return its node's result; an error is raised on all."""
        result = self.run_on_all_ranks(function if self.local_rank == 0 else lambda: None)
        return self.all_gather_object(result)[self.rank - self.local_rank]

    def run_on_all_ranks(self, function: Callable):
        """Call a function on every rank and return this rank's result; an error of one rank is raised on all."""
        result, error = outcome_of(function)
        errors = [other for other in self.all_gather_object(error) if other is not None]
        return unwrap(result, error or next(iter(errors), None))


def outcome_of(function: Callable) -> tuple:
    """Return (result, None), or (None, error) if the function raises."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def unwrap(result, error: Exception | None):
    """Return the result of `outcome_of`, or raise its error."""
    if error is not None:
        raise error
    return result


def init_distributed() -> Processes:
    """Join the processes that torchrun started (nccl on CUDA, gloo on CPU); a single one needs no process group."""
    rank, world_size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world_size, device = max(world_size, 1), torch.device("cpu")
    if torch.cuda.is_available():
        on_node, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if on_node > gpus:
            raise UserError(f"{on_node} processes for {gpus} GPU(s); lower --nproc_per_node to {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # cuDNN attention plans anew for every shape (about 0.4 s), and here almost every pass has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore(store_prefix(), next(dist.rendezvous("env://", timeout=TIMEOUT))[0])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        threading.Thread(target=watch_for_hangs, args=(threading.get_ident(),), daemon=True).start()
    return Processes(rank, world_size, device, local_rank)


def store_prefix() -> str:
    """Return the prefix under which the ranks of this attempt find each other in the store.

    Workers that torchrun restarts share a store with their dead predecessors, whose addresses they must not take. The
    agents of several nodes count restarts separately, so there the prefix is constant: docs/fault_tolerance.md says how
    to get a new store for each attempt.
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if one_node else 0}"


def destroy_distributed() -> None:
    """Leave the process group, if there is one; only at an orderly end, since the ranks wait for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def watch_for_hangs(thread: int) -> None:
    """Report where the given thread is whenever no collective was called for a while; runs in a thread of its own.

    When one rank hangs and the others wait for it, all of them report where they are.
    """
    before = None
    while dist.is_initialized():
        collectives = dist.group.WORLD._get_sequence_number_for_group()
        if collectives == before and (frame := sys._current_frames().get(thread)):
            place = call_stack(traceback.extract_stack(frame))
            seconds = f"{HANG_WARNING.total_seconds():g} s"
            print(f"warning: {rank_name()}: no collective for {seconds}; it is in {place}", file=sys.stderr, flush=True)
        before = collectives
        time.sleep(HANG_WARNING.total_seconds())


def check_shared_filesystem(path: Path, processes: Processes) -> None:
    """Wait until every rank reads in a text file what rank 0 reads. Raises UserError on all ranks if one never does.

    Other nodes may see late what rank 0 has written and renamed, and never if the filesystem is not shared.
    """
    text = processes.run_on_rank0(lambda: path.read_text(encoding="utf-8"))

    def wait() -> None:
        """Poll the file for up to VISIBILITY_TIMEOUT seconds. Raises UserError if it does not appear."""
        end, found = time.monotonic() + VISIBILITY_TIMEOUT, None
        while True:
            with suppress(OSError):
                found = path.read_text(encoding="utf-8")
            if found == text:
                return
            if time.monotonic() > end:
                state = "is missing" if found is None else "has another content"
                waited = f"{rank_name()} waited {VISIBILITY_TIMEOUT} s for {path}, which {state} there"
                raise UserError(f"save_path: {waited}; use a folder on a filesystem that all nodes share")
            time.sleep(0.1)

    processes.run_on_all_ranks(wait)
