"""Processes: joining those of a run, sharing a model among them, and collecting what they hold."""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from config import Config, UserError
from footprint import Step, estimate
from spread import hand_out, set_aside

ROOM = 0.9  # of a GPU's memory that a step may take by its estimate; the rest is for what the allocator loses
# For how long processes wait for one that does not answer, before they give up. More than the longest save takes.
PATIENCE = timedelta(minutes=30)
CAN_SHARD = hasattr(FSDPModule, "set_reshard_after_forward")  # torch 2.8
QUIET = timedelta(minutes=10)  # without an exchange, after which a process says where it stands
VISIBLE = 60  # seconds within which all see on a shared file system what the main process wrote
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its global rank, their number, its device, and its rank on its node."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def print(self, *words) -> None:
        """print, on the main process only."""
        if self.is_main:
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

    def on_main(self, function: Callable):
        """What a function returns on the main process, which alone calls it, for all; what it raises, all raise."""
        outcome = tried(function) if self.is_main else (None, None)
        if self.world_size == 1:
            return result_of(*outcome)
        message = [outcome]
        dist.broadcast_object_list(message, src=0)
        return result_of(*(outcome if self.is_main else message[0]))  # the original error has the traceback

    def on_each_node(self, function: Callable):
        """What a function returns on this node's first process, the one there to call it; what it raises, all raise."""
        result = self.on_all(function if self.local_rank == 0 else lambda: None)
        return self.gather(result)[self.rank - self.local_rank]

    def on_all(self, function: Callable):
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


def start_processes() -> Processes:
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
        store = dist.PrefixStore(attempt(), next(dist.rendezvous("env://", timeout=PATIENCE))[0])
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
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
            since = f"has exchanged nothing for {QUIET.total_seconds():g} s; it stands in {place}"
            print(f"warning: {name_of(rank)} {since}", file=sys.stderr, flush=True)
        before = exchanges
        time.sleep(QUIET.total_seconds())


def places(frames: traceback.StackSummary) -> str:
    """The functions of this program in a stack, the outermost first."""
    own = [frame for frame in frames if Path(frame.filename).parent == ROOT and not frame.name.startswith("<")]
    return " > ".join(frame.name for frame in own)


def name_of(rank: int) -> str:
    """A process as messages name it."""
    return f"rank {rank} on {socket.gethostname()}"


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process has ended or does not answer; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def check_shared(path: Path, processes: Processes) -> None:
    """Waits until every process reads in a text file what the main one does; else all raise the UserError of one.

    Others may see late what one process has written and renamed, and never where a file system is not shared.
    """
    text = processes.on_main(lambda: path.read_text(encoding="utf-8"))
    processes.on_all(lambda: wait_for(path, text, processes.rank))


def wait_for(path: Path, text: str, rank: int) -> None:
    """Waits until a file holds a text. Raises UserError if it does not come."""
    end, found = time.monotonic() + VISIBLE, None
    while found != text:
        if time.monotonic() > end:
            what = "is not there" if found is None else "is another"
            advice = "save_path must be a folder that all nodes share"
            waited = f"{name_of(rank)} waited {VISIBLE} s for {path} as the main process has it, but there it {what}"
            raise UserError(f"save_path: {waited}; {advice}")
        with suppress(OSError):
            found = path.read_text(encoding="utf-8")
        if found != text:
            time.sleep(0.1)


def attempt() -> str:
    """A name for this start of the processes, under which they find each other.

    Workers that torchrun restarts share a store with their dead forerunners, whose addresses they must not take. The
    agents of several nodes count restarts each for itself, so a name there is the same for all:
    docs/fault_tolerance.md tells how to get a store for each attempt.
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if one_node else 0}"


def stop_processes() -> None:
    """Leaves the process group, if there is one; for an orderly end only, since the processes wait for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose(model: nn.Module, config: Config, shapes: list[dict[str, int]], processes: Processes) -> tuple[str, bool]:
    """How the training is shared (ddp or fsdp), and whether fsdp keeps gathered weights: the first that fits.

    shapes: those of the largest batches, as `footprint.Step` takes them. All processes decide by the smallest GPU; on a
    CPU the first is taken. Raises UserError where torch is too old for fsdp.
    """
    asked = "ddp" if config.lora_rank or config.compile else config.parallel
    known = (("ddp", True), ("fsdp", True), ("fsdp", False)) if CAN_SHARD else (("ddp", True),)
    choices = [choice for choice in known if asked in ("auto", choice[0])]
    if not choices:
        raise UserError(f"parallel: fsdp needs torch 2.8 or newer, this is {torch.__version__}: update it, or take ddp")
    [room] = processes.max([-gpu_memory(processes.device)])
    if processes.world_size == 1 or room == -math.inf:
        return choices[0]
    options = {"world_size": processes.world_size, "accumulate": config.gradient_accumulation_steps > 1}
    options |= {"bf16": config.bf16, "gradient_checkpointing": config.gradient_checkpointing}
    for strategy, keep in choices:
        steps = [Step(strategy, keep_weights=keep, **options, **shape) for shape in shapes]
        footprint = max((estimate(model, step) for step in steps), key=lambda footprint: footprint.total)
        if footprint.total < ROOM * -room:
            break
    gathered = f", weights gathered {'once in a step' if keep else 'in every pass'}" if strategy == "fsdp" else ""
    processes.print(f"parallel: {strategy}{gathered}; a step takes about {footprint} of each GPU")
    if footprint.total >= ROOM * -room:
        advice = "lower batch_size_training, or set bf16 and gradient_checkpointing"
        processes.print(f"warning: the smallest GPU has {-room / 2**30:.1f} GiB, which may be too little; {advice}")
    return strategy, keep


def gpu_memory(device: torch.device) -> float:
    """The bytes of memory that a GPU has; more than any on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def distribute(model: nn.Module, strategy: str, bf16: bool, keep: bool, processes: Processes) -> nn.Module:
    """Shares the training of a Coconut module among the processes, and returns the module to call.

    model: whole in the main process, in the others on the meta device, where no memory is spent on it.
    ddp: a copy of the model in every process. fsdp: weights, gradients and optimizer state sharded, a unit for each
    transformer block (FSDP2). One process needs neither.
    keep: whether sharded weights are gathered once in a step, and stay until `reshard`, or anew for every pass.
    """
    if processes.world_size == 1:
        return model.to(processes.device)
    if strategy == "ddp":
        replicate(model, processes)
        return settle_buckets(DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": dist.init_device_mesh(processes.device.type, (processes.world_size,))}
    values = set_aside(model)  # sharded first, then filled: no process has the whole model on its device
    for block in model.blocks:
        fully_shard(block, **options, **({"mp_policy": policy} if bf16 else {}))
    fully_shard(model, **options)  # the head computes in float32
    hand_out(model, values, processes)
    for unit in units(model):
        unit.set_reshard_after_forward(unit is not model and not keep, recurse=False)
        unit.set_reshard_after_backward(not keep, recurse=False)
        # Sums that are divided afterwards: the mean that gloo of torch 2.8 makes is a sum.
        unit.set_force_sum_reduction_for_comms(processes.device.type == "cpu")
    return model


def replicate(model: nn.Module, processes: Processes) -> None:
    """Puts a copy of the main process's model on every process's device."""
    if processes.world_size == 1:
        model.to(processes.device)
    else:
        hand_out(model, set_aside(model), processes)


def units(model: nn.Module) -> list[FSDPModule]:
    """The parts of a model that are sharded as one; none if it is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Frees what is gathered of a sharded model's weights, but for this process's shards."""
    for unit in units(model):
        unit.reshard()


def settle_buckets(model: DistributedDataParallel) -> DistributedDataParallel:
    """Makes a first backward pass, for nothing, after which DDP keeps its buckets of gradients as they are.

    DDP orders the buckets anew after the first pass, and sums in other buckets differ in their last bits. Without this
    a continued run would not compute what an undisturbed one does.
    """
    model.reducer.prepare_for_backward([])
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    clear_gradients(model)
    return model


def clear_gradients(model: nn.Module) -> None:
    """Frees the gradients, or sets them to 0 where they lie in the buckets of DDP, which would else hold them twice."""
    model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def is_sharded(model: nn.Module) -> bool:
    """Whether the module's weights are sharded, so that all processes must make the same passes."""
    return isinstance(model, FSDPModule)


def gradient_sync(model: nn.Module, last: bool):
    """A context for a backward pass: copies of a model exchange their gradients in the last one of a step alone.

    Shards always do: otherwise every process would hold the whole gradient in between.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def whole_weights(model: nn.Module, keep: bool) -> Iterator[None]:
    """Holds the whole weights of a sharded model in every process, which may then make passes on its own account.

    keep: as in `distribute`.
    """
    for unit in units(model):
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units(model):
            unit.set_reshard_after_forward(unit is not model and not keep, recurse=False)
        reshard(model)
