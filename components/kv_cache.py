"""The KV cache of thoughts: buffers that every pass appends to, and the mask of a pass over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

ALIGNMENT = 8  # elements: attention kernels on a GPU copy a mask whose rows begin elsewhere


class Append(torch.autograd.Function):
    """Writes new columns behind the past ones in a shared buffer, and returns all columns as a view of it.

    buffer (..., capacity, size), past (..., columns, size) or None, new (..., n, size) -> (..., columns + n, size).
    Earlier views stay valid for the backward pass, since the columns that they show are never written again, but with
    the same values where a block is recomputed; so the write may go past autograd's check for changed values (`.data`).
    """

    @staticmethod
    def forward(ctx, buffer: Tensor, past: Tensor | None, new: Tensor) -> Tensor:
        ctx.start = 0 if past is None else past.shape[-2]
        end = ctx.start + new.shape[-2]
        buffer.data[..., ctx.start : end, :] = new
        return buffer[..., :end, :]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, gradient[..., : ctx.start, :] if ctx.start else None, gradient[..., ctx.start :, :]


class BufferedLayer(DynamicLayer):
    """A cache layer that holds all keys and values once, in buffers for `capacity` columns.

    transformers' own layer concatenates, so that every pass keeps a copy of all that came before it.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.buffers: list[Tensor] = []  # of keys and values, (batch, heads, capacity, size) each

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends (batch, heads, n, size) keys and values, and returns those of all columns.

        Rotary embeddings make float32 keys under autocast. They are stored in the values' type, as attention takes
        them: otherwise it would cast and save all of them in every pass.
        """
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
            self.keys = self.values = None
        if not self.buffers:
            for states in (key_states, value_states):
                self.buffers.append(states.new_empty(*states.shape[:-2], self.capacity, states.shape[-1]))
        self.keys = Append.apply(self.buffers[0], self.keys, key_states)
        self.values = Append.apply(self.buffers[1], self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows of the batch alone."""
        columns = self.keys.shape[-2]
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :columns, :] for buffer in self.buffers)


def causal_mask(attention_mask: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Where the last columns may look: (batch, all columns) real tokens -> (batch, 1, columns, all columns) of `dtype`.

    0 where they may and -inf where not: what attention adds to its scores, made once for all layers, in rows that begin
    where kernels want them. Every column sees itself, padding too: attention over nothing is not a number.
    """
    size = attention_mask.shape[1]
    keys = torch.arange(size, device=attention_mask.device)  # (all columns,)
    queries = keys[-columns:, None]  # (columns, 1)
    visible = (attention_mask[:, None, None].bool() & (keys < queries)) | (keys == queries)  # (batch, 1, columns, all)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    # Never without padding: a mask that is contiguous at some lengths alone would be compiled for as another kind.
    return F.pad(mask, (0, ALIGNMENT - size % ALIGNMENT))[..., :size]
