"""DDP and FSDP2: how the training of a model is divided among ranks, and how its weights get there from rank 0."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from components.distributed import Processes
from config import Config, UserError

HAS_FSDP2 = hasattr(FSDPModule, "set_reshard_after_forward")  # torch 2.8
# Rank 0's weights and buffers are on every rank before DDP sees them, and passes do not change buffers. torch 2.13 gave
# the keyword a new name, under which DDP would still broadcast the buffers once, at the start, unless init_sync is off.
NO_SYNC = {"broadcast_buffers": False}
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    NO_SYNC = {"forward_sync_buffers": False, "init_sync": False}
BYTES_PER_PARAMETER = 16  # weight, gradient and Adam's two moments, in float32


def choose_strategy(model: nn.Module, config: Config, processes: Processes) -> str:
    """Return "ddp" or "fsdp", as `parallel` asks for.

    auto: ddp where weights, gradients and optimizer state take less than half of the smallest GPU, and on a CPU.
    Raises UserError where torch is too old for fsdp.
    """
    strategy = "ddp" if config.lora_rank or config.compile else config.parallel
    if strategy == "fsdp" and not HAS_FSDP2:
        raise UserError(f"parallel: fsdp needs torch 2.8 or newer, this is {torch.__version__}; update it, or set ddp")
    if strategy != "auto":
        return strategy
    [smallest] = processes.all_reduce_max([-gpu_memory(processes.device)])
    size = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    return "fsdp" if HAS_FSDP2 and size >= -smallest / 2 else "ddp"


def gpu_memory(device: torch.device) -> float:
    """Return the bytes of memory of a GPU, infinity for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def parallelize(model: nn.Module, blocks: nn.ModuleList, strategy: str, bf16: bool, processes: Processes) -> nn.Module:
    """Divide the training of a model among ranks and return the module to call.

    model: with its weights on rank 0, on the meta device elsewhere. blocks: its transformer blocks.
    ddp: a replica on every rank. fsdp: weights, gradients and optimizer state are sharded, one FSDP2 unit per block
    and one for the rest; gathered weights are kept until `reshard`, at the end of an optimizer step, since every
    thought is a pass of its own. One process needs neither.
    """
    if processes.world_size == 1:
        return model.to(processes.device)
    if strategy == "ddp":
        replicate(model, processes)
        return freeze_buckets(DistributedDataParallel(model, **NO_SYNC, gradient_as_bucket_view=True))
    # Inputs stay in float32, as under DDP: with a bfloat16 residual stream, rounding errors would grow with every
    # thought. Not on a CPU, whose autocast leaves layer norms in the dtypes they get, and those must be one.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=processes.device.type == "cpu",
    )
    options = {"mesh": dist.init_device_mesh(processes.device.type, (processes.world_size,))}
    weights = to_meta(model)  # sharded first, then filled: no rank has the whole model on its device
    for block in blocks:
        fully_shard(block, **options, **({"mp_policy": policy} if bf16 else {}))
    fully_shard(model, **options)  # the head computes in float32
    load_from_rank0(model, weights, processes)
    for unit in fsdp_units(model):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        # Sum, then divide: on the CPU, torch 2.8's gloo computes a sum where FSDP asks for a mean.
        unit.set_force_sum_reduction_for_comms(processes.device.type == "cpu")
    return model


def replicate(model: nn.Module, processes: Processes) -> None:
    """Put a copy of rank 0's model on every rank's device."""
    if processes.world_size == 1:
        model.to(processes.device)
    else:
        load_from_rank0(model, to_meta(model), processes)


# --- tensors between ranks --------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List all parameters and buffers; a shared one comes once."""
    return [*model.named_parameters(), *model.named_buffers()]


def replace_tensors(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every parameter and buffer by make(name, tensor); shared ones stay shared."""
    replaced = {}
    for name, old in named_tensors(model):
        new = make(name, old.detach())
        replaced[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: replaced[old] for name, old in tensors.items() if old is not None})


def to_meta(model: nn.Module) -> dict[str, Tensor]:
    """Move a model to the meta device and return the values it had, {} if it was there already."""
    values = {name: tensor.detach() for name, tensor in named_tensors(model) if not tensor.is_meta}
    replace_tensors(model, lambda _, tensor: tensor.to("meta"))
    return values


def load_from_rank0(model: nn.Module, values: dict[str, Tensor], processes: Processes) -> None:
    """Fill a model on the meta device, sharded or not, with the values that `to_meta` returned on rank 0."""
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in named_tensors(model)]
    if processes.run_on_rank0(lambda: shapes) != shapes:
        raise RuntimeError("the ranks have built different models; are all packages the same versions on every node?")
    replace_tensors(model, lambda name, tensor: tensor_from_rank0(values.pop(name, None), tensor, processes))


def tensor_from_rank0(value: Tensor | None, like: Tensor, processes: Processes) -> Tensor:
    """Return this rank's part, on its device, of a tensor that rank 0 has (others pass None).

    like: a tensor of that shape and dtype; if it is a DTensor, the value is scattered alike, else broadcast.
    """
    if processes.is_rank0:
        value = value.to(processes.device, like.dtype).contiguous()
    else:
        value = torch.empty(like.shape, dtype=like.dtype, device=processes.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    if processes.world_size > 1:
        dist.broadcast(value.view(-1).view(torch.uint8), src=0)  # as bytes: gloo does not send every dtype
    return value


def full_tensors(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Gather sharded tensors one by one; returns the full ones in host memory on rank 0, {} elsewhere."""
    full = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_rank0:
            full[name] = tensor.cpu()
    return full


# --- an optimizer step ------------------------------------------------------------------------------------------------


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """List the modules whose parameters are gathered together; none if the model is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is sharded by FSDP2."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of a sharded model."""
    for unit in fsdp_units(model):
        unit.reshard()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold a sharded model's full weights on every rank, which may then run passes independently."""
    for unit in fsdp_units(model):
        unit.unshard()
    try:
        yield
    finally:
        reshard(model)


def freeze_buckets(model: DistributedDataParallel) -> DistributedDataParallel:
    """Run a first backward pass over all parameters, after which DDP keeps the order of its gradient buckets.

    DDP reorders its buckets after the first pass, and sums over other buckets differ in their last bits: a resumed run
    would not compute what an uninterrupted one does.
    """
    model.reducer.prepare_for_backward([])
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    zero_grad(model)
    return model


def zero_grad(model: nn.Module) -> None:
    """Free the gradients; those in DDP's buckets are set to zero instead, since a freed one would be held twice."""
    model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def sync_gradients(model: nn.Module, last: bool):
    """Return the context of a micro-batch: DDP all_reduces in the last one of a step only.

    FSDP reduce_scatters in each; otherwise every rank would accumulate a full gradient.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
