"""Activation checkpointing: blocks whose activations are checkpointed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

MIN_CHECKPOINTED_COLUMNS = (
    16  # passes of fewer columns keep their activations: they hold little, and would take most time
)


def recompute(blocks: nn.ModuleList, mode: str) -> None:
    """Makes the blocks of a model compute their activations again for the backward pass instead of keeping them.

    mode: "block" for whole blocks, which keep their input alone, or "mlp" for the parts of that name. Dropout and the
    cache are as in the first computation, so gradients are the same. It changes nothing without gradients.
    Raises ValueError for blocks without a part `mlp`.
    """
    for number, block in enumerate(blocks):
        if mode == "block":
            block.forward = checkpointed(block.forward, number)
        elif hasattr(block, "mlp"):
            block.mlp.forward = checkpointed(block.mlp.forward)
        else:
            raise ValueError(f"{type(block).__name__} has no part named mlp; choose gradient_checkpointing: block")


def checkpointed(forward: Callable, layer: int | None = None) -> Callable:
    """A forward function of (batch, columns, hidden) states that is called again in the backward pass.

    layer: the cache layer that it appends to, if any, which is then set back to what it was before the first call.
    """

    def call(hidden_states: Tensor, *args, **kwargs):
        """Keeps the inputs alone, unless the pass is short or needs no gradient."""
        if not torch.is_grad_enabled() or hidden_states.shape[1] < MIN_CHECKPOINTED_COLUMNS:
            return forward(hidden_states, *args, **kwargs)
        caches = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)] if layer is not None else []
        before = [vars(cache.layers[layer]).copy() for cache in caches]

        def again(*args, **kwargs):
            for cache, state in zip(caches, before, strict=True):
                vars(cache.layers[layer]).update(state)
            return forward(*args, **kwargs)

        return checkpoint(again, hidden_states, *args, use_reentrant=False, **kwargs)

    return call
