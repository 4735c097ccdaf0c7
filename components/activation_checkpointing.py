"""Activation checkpointing for models that are given a KV cache, which transformers' own drops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from config import UserError

MIN_CHECKPOINTED_COLUMNS = 16  # shorter passes keep their activations: little memory, and as many launches to recompute


def checkpoint_activations(blocks: nn.ModuleList, mode: str) -> None:
    """Make transformer blocks recompute their activations in the backward pass instead of keeping them.

    Dropout masks and the KV cache are those of the first computation, so gradients are the same. Passes without
    gradients are not affected.

    Args:
        blocks: the model's transformer blocks; their `forward` is replaced.
        mode: "block" keeps only the input of each block, "mlp" only that of each block's submodule `mlp`.

    Raises UserError for mode "mlp" where a block has no submodule `mlp`, before any block is changed.
    """
    if mode == "mlp" and (names := [type(block).__name__ for block in blocks if not hasattr(block, "mlp")]):
        raise UserError(f"gradient_checkpointing: mlp: {names[0]} has no submodule of that name; set block")
    for number, block in enumerate(blocks):
        if mode == "block":
            block.forward = checkpointed(block.forward, number)
        else:
            block.mlp.forward = checkpointed(block.mlp.forward)


def checkpointed(forward: Callable, layer: int | None = None) -> Callable:
    """Wrap a forward function of (batch, columns, hidden) states so that the backward pass calls it again.

    layer: the cache layer that it appends to, which is reset to its earlier state before the second call.
    """

    def call(hidden_states: Tensor, *args, **kwargs):
        """Run `forward` and keep only its inputs, unless the pass is short or needs no gradient."""
        if not torch.is_grad_enabled() or hidden_states.shape[1] < MIN_CHECKPOINTED_COLUMNS:
            return forward(hidden_states, *args, **kwargs)
        caches = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)] if layer is not None else []
        before = [vars(cache.layers[layer]).copy() for cache in caches]

        def recompute(*args, **kwargs):
            """Run `forward` from the cache's earlier state."""
            for cache, state in zip(caches, before, strict=True):
                vars(cache.layers[layer]).update(state)
            return forward(*args, **kwargs)

        return checkpoint(recompute, hidden_states, *args, use_reentrant=False, **kwargs)

    return call
