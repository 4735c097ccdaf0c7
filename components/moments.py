"""AdamW's state on the disk: twice the model's size, so it is written, read and shared out tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from components.distributed import Processes
from components.spread import spread

MOMENTS = "optimizer.safetensors"  # tensors PARAMETER.KEY, such as ...weight.exp_avg
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def named_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """This process's part of the optimizer's state, PARAMETER.KEY -> tensor, in an order in which a file aligns all."""
    named = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return dict(sorted(named.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def write_tensors(path: Path, like: dict[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Writes a safetensors file of tensors that come one after the other.

    like: tensors (of any device) of their shapes and dtypes under their names.
    """
    header, end = {}, 0
    for name, tensor in like.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class TensorFile:
    """The tensors in a safetensors file by name: each is mapped when it is asked for, until nobody has it any more."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.path, "pt") as file:
            return iter(list(file.keys()))

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


def load_moments(
    saved: TensorFile | dict[str, Tensor] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> None:
    """Shares out an optimizer's state, named as by `named_moments`; every process calls it, the main one has it."""
    shapes = processes.run_on_rank0(lambda: {name: (saved[name].shape, saved[name].dtype) for name in saved})
    parameters, state = dict(model.named_parameters()), {}
    for name, (shape, dtype) in shapes.items():
        owner, _, key = name.rpartition(".")
        parameter = parameters[owner]
        like = parameter.detach() if parameter.shape == shape else torch.empty(shape, dtype=dtype)
        value = saved[name].clone() if processes.is_rank0 else None  # a copy, which outlives the file
        state.setdefault(parameter, {})[key] = spread(value, like, processes)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {number: state[parameter] for number, parameter in enumerate(order) if parameter in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
