"""LoRA with peft: train adapters and the new tokens' rows only, and merge them into the weights of a checkpoint.

No adapter covers the rows of the added tokens in embedding and head. They are trained as `new_rows`, small parameters
next to the frozen tables, and forward hooks use them in place of the tables' own rows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from config import UserError

ADAPTER = "default"  # peft's name of the only adapter


def add_lora(lm: nn.Module, rank: int, new_ids: list[int], bf16: bool = False) -> None:
    """Freeze the model, and add adapters to its linear layers (alpha = 2 * rank, no dropout) and `new_rows`.

    Args:
        lm: changed in place.
        new_ids: ids of the added tokens.
        bf16: store the frozen linear layers in bfloat16, in which autocast computes them anyway.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an optional package

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, lm, adapter_name=ADAPTER)
    if new_ids:
        add_new_rows(lm, new_ids)
    if bf16:
        store_in_bf16(lm)


def add_new_rows(lm: nn.Module, ids: list[int]) -> None:
    """Add a parameter new_rows (new, hidden), a copy of these rows, to embedding and head; tied tables share it."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = head.weight is embedding.weight
    for table in (embedding, head):
        table.register_buffer("new_ids", torch.tensor(ids), persistent=False)  # (new,)
        table.new_rows = nn.Parameter(table.weight.detach()[ids])  # (new, hidden)
    if tied:
        head.new_rows = embedding.new_rows
    embedding.register_forward_hook(embed_new_tokens)
    head.register_forward_hook(project_to_new_tokens)


def embed_new_tokens(embedding: nn.Module, args: tuple, embeds: Tensor) -> Tensor:
    """Forward hook: replace the embeddings (batch, length, hidden) of new tokens in args[0] (batch, length)."""
    is_new = args[0][..., None] == embedding.new_ids  # (batch, length, new)
    new = F.embedding(is_new.int().argmax(-1), embedding.new_rows)  # (batch, length, hidden), any row for old tokens
    new = new * getattr(embedding, "embed_scale", 1)  # Gemma 3
    return torch.where(is_new.any(-1, keepdim=True), new, embeds)


def project_to_new_tokens(head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    """Forward hook: replace the logits (..., vocabulary) of new tokens, from hidden states args[0] (..., hidden)."""
    bias = None if head.bias is None else head.bias[head.new_ids]
    return logits.index_copy_(-1, head.new_ids, F.linear(args[0], head.new_rows, bias))


def store_in_bf16(lm: nn.Module) -> None:
    """Convert the frozen linear layers to bfloat16, in which autocast computes them anyway.

    Autocast caches its casts only for weights that require a gradient: with float32 weights every forward pass would
    cast every frozen weight anew and save the copy for the backward pass. Tables, norms and head, which are computed in
    float32, stay float32. So do the weights of mixture-of-experts layers: peft adds the adapters to them in every
    forward pass, and bfloat16 would round the sums.
    """
    for module in lm.modules():
        base = module.get_base_layer() if hasattr(module, "get_delta_weight") else None
        if isinstance(base, nn.Linear | Conv1D):
            base.bfloat16()


def parameter_groups(lm: nn.Module, weight_decay: float) -> list[dict]:
    """Return the optimizer's parameter groups; new rows do not decay, like the rest of their frozen tables."""
    trainable = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    new_rows = [p for name, p in trainable.items() if name.endswith(".new_rows")]
    others = [p for name, p in trainable.items() if not name.endswith(".new_rows")]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": new_rows, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def merge_adapters(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the equivalent model without adapters. Neither `lm` nor `weights` is changed.

    They are float32, even where the frozen ones are bfloat16, which would round small updates away.
    """
    merged = {
        name.replace(".base_layer", ""): value.float() if value.dtype == torch.bfloat16 else value
        for name, value in weights.items()
        if ".lora_" not in name and not name.endswith(".new_rows")
    }
    for name, module in lm.named_modules():
        # peft adapts parameters of other names than weight in mixtures of experts
        name = f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
        if hasattr(module, "get_delta_weight"):
            merged[name] = merged[name] + module.get_delta_weight(ADAPTER).detach().to(merged[name])
        if hasattr(module, "new_rows") and name in merged:  # of tied tables, only one is
            rows = module.new_rows.detach().to(merged[name])
            merged[name] = merged[name].index_copy(0, module.new_ids.to(rows.device), rows)
    return merged


def trainable_weights(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the trained weights: adapters and new rows."""
    return {name: weights[name] for name, p in lm.named_parameters() if p.requires_grad}


def frozen_checksum(lm: nn.Module) -> str:
    """Compute the SHA-256 of the names and values of all frozen weights."""
    digest = hashlib.sha256()
    for name, parameter in lm.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_frozen(lm: nn.Module, checksum: str, checkpoint: Path) -> None:
    """Raise UserError unless the frozen weights have the `frozen_checksum` that a checkpoint was trained with."""
    if checksum != frozen_checksum(lm):
        raise UserError(
            f"lora_rank: {checkpoint} was trained on other frozen weights than those of model_id or load_model_path; "
            "restore the weights that the run started from, or start a new run from its model: another name and "
            f"load_model_path={checkpoint}"
        )
