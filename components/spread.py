"""Tensors of a model that many processes share: from the main process to where they belong, and back.

The main process alone reads or makes a whole model, the others build it on the meta device, without memory. So no other
process ever holds more than its own part and one whole tensor on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from components.distributed import Processes

PIECE = 2**22  # bytes of a part that are collected at a time, since gloo makes a copy of them all


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers; one that several modules share comes once."""
    return [*model.named_parameters(), *model.named_buffers()]


def replace_tensors(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Puts make(name, tensor) in the place of every parameter and buffer; what modules share, they go on sharing."""
    made = {}
    for name, old in named_tensors(model):
        new = make(name, old.detach())
        made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: made[old] for name, old in tensors.items() if old is not None})


def set_aside(model: nn.Module) -> dict[str, Tensor]:
    """Takes the values out of a model, which is then on the meta device: {} where they were not there before."""
    values = {name: tensor.detach() for name, tensor in named_tensors(model) if not tensor.is_meta}
    replace_tensors(model, lambda _, tensor: tensor.to("meta"))
    return values


def hand_out(model: nn.Module, values: dict[str, Tensor], processes: Processes) -> None:
    """Gives every process its part of the main one's values, of which nothing is left; see `spread`.

    model: on the meta device, sharded or not; values: by name, as `set_aside` returns them. Every process calls it.
    """
    mine = [(name, tensor.shape, tensor.dtype) for name, tensor in named_tensors(model)]
    if processes.run_on_rank0(lambda: mine) != mine:
        raise RuntimeError("the processes have built different models; do they run the same versions of everything?")
    replace_tensors(model, lambda name, tensor: spread(values.pop(name, None), tensor, processes))


def spread(value: Tensor | None, like: Tensor, processes: Processes) -> Tensor:
    """This process's part of a tensor that the main one has (others give None), on its device.

    like: a tensor of the same shape and dtype; where it is sharded (in its first dimension, as FSDP does it), the part
    is sharded alike and the whole tensor is nowhere but in the main process.
    """
    if processes.is_rank0:
        value = value.to(processes.device, like.dtype).contiguous()
    if not isinstance(like, DTensor):
        whole = value if processes.is_rank0 else torch.empty(like.shape, dtype=like.dtype, device=processes.device)
        if processes.world_size > 1:
            dist.broadcast(as_bytes(whole), src=0)
        return whole
    part = torch.empty(part_shape(like, processes), dtype=like.dtype, device=processes.device)
    parts = None
    if processes.is_rank0:
        missing = len(part) * processes.world_size - len(value)  # rows of padding, so that all parts are equal
        value = pad_rows(value, missing)
        parts = [as_bytes(p) for p in value.chunk(processes.world_size)]
    dist.scatter(as_bytes(part), parts, src=0)
    own = part[: len(like.to_local())]
    return DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def collect(tensor: Tensor, processes: Processes) -> Tensor | None:
    """The reverse of `spread`: the whole of a tensor in the main process's CPU memory, None in the others."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.cpu() if processes.is_rank0 else None
    shape, own = part_shape(tensor, processes), tensor.to_local()
    whole, places = None, []
    if processes.is_rank0:
        whole = torch.empty((shape[0] * processes.world_size, *shape[1:]), dtype=own.dtype, device=own.device)
        places = [as_bytes(part).split(PIECE) for part in whole.chunk(processes.world_size)]
    for number, piece in enumerate(as_bytes(pad_rows(own, shape[0] - len(own))).split(PIECE)):
        dist.gather(piece, [pieces[number] for pieces in places] or None, dst=0)
    return whole[: len(tensor)].cpu() if processes.is_rank0 else None


def while_collecting(tensors: Iterable[Tensor], function: Callable, processes: Processes):
    """What function(iterator over the whole tensors) returns in the main process; what it raises, all raise.

    Every process calls it, and all but the main one send their parts, of all tensors in any case: a main process that
    cannot write them any more leaves none waiting.
    """
    whole = (collect(tensor, processes) for tensor in tensors)

    def consume():
        try:
            return function(whole)
        finally:
            deque(whole, maxlen=0)

    if not processes.is_rank0:
        deque(whole, maxlen=0)
    return processes.run_on_rank0(consume)


def part_shape(tensor: DTensor, processes: Processes) -> tuple[int, ...]:
    """The shape of the largest part of a sharded tensor, to which the others are padded on their way."""
    return (-(-len(tensor) // processes.world_size), *tensor.shape[1:])


def pad_rows(tensor: Tensor, count: int) -> Tensor:
    """A tensor with `count` rows of zeros after its own; itself, where there are none to add."""
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, count)) if count else tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as (bytes,) of uint8: not every backend sends every dtype."""
    return tensor.view(-1).view(torch.uint8)
