"""Low-rank adapters by peft: a small part of a large model is trained, and saved merged into its weights.

Besides the adapters, `new_rows` are trained: the embedding and head rows of the added tokens, which no adapter could
teach. They lie beside the frozen tables as small parameters of their own, and forward hooks put them in their places.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from config import UserError

ADAPTER = "default"  # peft's name for the only adapter


def add_lora(lm: nn.Module, rank: int, new_ids: list[int], bf16: bool = False) -> None:
    """Freezes the model but for adapters of the given rank in its linear layers (alpha twice the rank, no dropout) and
    for the rows of the added tokens. With bf16 the frozen linear layers are stored in what autocast computes with."""
    from peft import LoraConfig, inject_adapter_in_model  # an optional package

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, lm, adapter_name=ADAPTER)
    if new_ids:
        add_new_rows(lm, new_ids)
    if bf16:
        store_in_bf16(lm)


def add_new_rows(lm: nn.Module, ids: list[int]) -> None:
    """Gives the embedding and the head a parameter new_rows (rows, hidden) for these tokens; tied tables share it."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = head.weight is embedding.weight
    for table in (embedding, head):
        table.register_buffer("new_ids", torch.tensor(ids), persistent=False)  # (rows,)
        table.new_rows = nn.Parameter(table.weight.detach()[ids])  # (rows, hidden), a copy
    if tied:
        head.new_rows = embedding.new_rows
    embedding.register_forward_hook(embed_new_tokens)
    head.register_forward_hook(project_to_new_tokens)


def embed_new_tokens(embedding: nn.Module, args: tuple, embeds: Tensor) -> Tensor:
    """Forward hook: the embeddings (batch, length, hidden) of the (batch, length) tokens, new rows in their places."""
    is_new = args[0][..., None] == embedding.new_ids  # (batch, length, rows)
    new = F.embedding(is_new.int().argmax(-1), embedding.new_rows)  # (batch, length, hidden), any row for old tokens
    new = new * getattr(embedding, "embed_scale", 1)  # Gemma 3's
    return torch.where(is_new.any(-1, keepdim=True), new, embeds)


def project_to_new_tokens(head: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    """Forward hook: the logits (..., vocabulary) of hidden states (..., hidden), the new tokens' from their rows."""
    bias = None if head.bias is None else head.bias[head.new_ids]
    return logits.index_copy_(-1, head.new_ids, F.linear(args[0], head.new_rows, bias))


def store_in_bf16(lm: nn.Module) -> None:
    """Turns the frozen linear layers to bfloat16, in which autocast computes them anyway.

    Autocast keeps casts only of weights that require a gradient, so every pass would make, and save for its backward
    pass, a copy of every frozen weight. What is computed in float32 stays so: tables, norms and the head. So do the
    matrices of mixtures of experts, into which peft adds the adapters in every pass: bfloat16 would round the sums.
    """
    for module in lm.modules():
        base = module.get_base_layer() if hasattr(module, "get_delta_weight") else None
        if isinstance(base, nn.Linear | Conv1D):
            base.bfloat16()


def parameter_groups(lm: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters for the optimizer; new rows of frozen tables do not decay, as the others do not."""
    trainable = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    new_rows = [p for name, p in trainable.items() if name.endswith(".new_rows")]
    others = [p for name, p in trainable.items() if not name.endswith(".new_rows")]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": new_rows, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def merge_adapters(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same; `weights` itself and the model stay.

    They are float32, also where the frozen ones are bfloat16, which would round small updates away.
    """
    plain = {
        name.replace(".base_layer", ""): value.float() if value.dtype == torch.bfloat16 else value
        for name, value in weights.items()
        if ".lora_" not in name and not name.endswith(".new_rows")
    }
    for name, module in lm.named_modules():
        # peft adapts parameters of other names than weight in mixtures of experts
        name = f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
        if hasattr(module, "get_delta_weight"):
            plain[name] = plain[name] + module.get_delta_weight(ADAPTER).detach().to(plain[name])
        if hasattr(module, "new_rows") and name in plain:  # a tied table is there once
            rows = module.new_rows.detach().to(plain[name])
            plain[name] = plain[name].index_copy(0, module.new_ids.to(rows.device), rows)
    return plain


def trainable_weights(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the model's weights that are trained: adapters and new rows."""
    return {name: weights[name] for name, p in lm.named_parameters() if p.requires_grad}


def frozen_checksum(lm: nn.Module) -> str:
    """The SHA-256 of all frozen weights, names included."""
    digest = hashlib.sha256()
    for name, parameter in lm.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_frozen(lm: nn.Module, checksum: str, checkpoint: Path) -> None:
    """Raises UserError unless the frozen weights have the `frozen_checksum` of those that a checkpoint is over."""
    if checksum != frozen_checksum(lm):
        raise UserError(
            f"lora_rank: {checkpoint} was trained over other frozen weights than model_id or load_model_path bring; "
            "put back what they brought when the run began, or start a new run from its model: another name, "
            f"load_model_path={checkpoint}"
        )
