"""DDP and FSDP2: how a model's training is shared among processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from components.distributed import Processes
from components.spread import hand_out, set_aside
from config import Config, UserError
from footprint import Step, estimate

ROOM = 0.9  # of a GPU's memory that a step may take by its estimate; the rest is for what the allocator loses

HAS_FSDP2 = hasattr(FSDPModule, "set_reshard_after_forward")  # torch 2.8


def choose(model: nn.Module, config: Config, shapes: list[dict[str, int]], processes: Processes) -> tuple[str, bool]:
    """How the training is shared (ddp or fsdp), and whether fsdp keeps gathered weights: the first that fits.

    shapes: those of the largest batches, as `footprint.Step` takes them. All processes decide by the smallest GPU; on a
    CPU the first is taken. Raises UserError where torch is too old for fsdp.
    """
    asked = "ddp" if config.lora_rank or config.compile else config.parallel
    known = (("ddp", True), ("fsdp", True), ("fsdp", False)) if HAS_FSDP2 else (("ddp", True),)
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
        return freeze_buckets(DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True))
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


def freeze_buckets(model: DistributedDataParallel) -> DistributedDataParallel:
    """Makes a first backward pass, for nothing, after which DDP keeps its buckets of gradients as they are.

    DDP orders the buckets anew after the first pass, and sums in other buckets differ in their last bits. Without this
    a continued run would not compute what an undisturbed one does.
    """
    model.reducer.prepare_for_backward([])
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    zero_grad(model)
    return model


def zero_grad(model: nn.Module) -> None:
    """Frees the gradients, or sets them to 0 where they lie in the buckets of DDP, which would else hold them twice."""
    model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def is_sharded(model: nn.Module) -> bool:
    """Whether the module's weights are sharded, so that all processes must make the same passes."""
    return isinstance(model, FSDPModule)


def sync_gradients(model: nn.Module, last: bool):
    """A context for a backward pass: copies of a model exchange their gradients in the last one of a step alone.

    Shards always do: otherwise every process would hold the whole gradient in between.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def unsharded(model: nn.Module, keep: bool) -> Iterator[None]:
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
