"""A KV cache for training in several passes: buffers that every pass appends to, and the attention mask of a pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

ALIGNMENT = 8  # elements: GPU attention kernels copy a mask whose rows begin elsewhere


class Append(torch.autograd.Function):
    """Write new columns after the past ones into a shared buffer and return all columns as a view of it.

    buffer (..., capacity, size), past (..., columns, size) or None, new (..., n, size) -> (..., columns + n, size).
    Earlier views stay valid for the backward pass, since their columns are never written again, except with the same
    values where a block is recomputed; so the write may bypass autograd's version check (`.data`).
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
    """A cache layer that stores keys and values once, in buffers for `capacity` columns.

    transformers' own layer concatenates, so every pass keeps a copy of all columns before it for the backward pass.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.buffers: list[Tensor] = []  # of keys and values, (batch, heads, capacity, size) each

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, n, size) keys and values and return those of all columns.

        Under autocast, rotary embeddings make float32 keys. They are stored in the values' dtype, which attention uses:
        otherwise it would cast and save all of them in every pass.
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
        """Keep only the given rows of the batch."""
        columns = self.keys.shape[-2]
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :columns, :] for buffer in self.buffers)


def causal_mask(attention_mask: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Build the additive mask of the last columns: (batch, all columns) -> (batch, 1, columns, all columns) of `dtype`.

    0 where attention is allowed, -inf elsewhere; made once for all layers, with rows aligned as kernels want them.
    Every column sees itself, padding too: attention over nothing is NaN.
    """
    size = attention_mask.shape[1]
    keys = torch.arange(size, device=attention_mask.device)  # (all columns,)
    queries = keys[-columns:, None]  # (columns, 1)
    visible = (attention_mask[:, None, None].bool() & (keys < queries)) | (keys == queries)  # (batch, 1, columns, all)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    # Always padded: a mask that is contiguous at some lengths only would be compiled for twice.
    return F.pad(mask, (0, ALIGNMENT - size % ALIGNMENT))[..., :size]
