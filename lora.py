"""Low-rank adapters by peft: a small part of a large model is trained, and saved merged into its weights."""

from __future__ import annotations

from torch import Tensor, nn

ADAPTER = "default"  # peft's name for the only adapter


def add_lora(lm: nn.Module, rank: int, new_rows: list[int]) -> None:
    """Freezes the model but for adapters of the given rank in its linear layers (alpha twice the rank, no dropout) and
    for the embedding and head rows of the added tokens, which no adapter could teach.

    Other rows get no gradient, so AdamW leaves them as they are while their weight decay is off (`parameter_groups`).
    """
    from peft import LoraConfig, inject_adapter_in_model  # an optional package

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, lm, adapter_name=ADAPTER)
    if new_rows:
        for weight in {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}:
            weight.requires_grad_(True)
            weight.register_hook(lambda gradient: only_rows(gradient, new_rows))


def only_rows(gradient: Tensor, rows: list[int]) -> Tensor:
    """The (vocabulary, hidden) gradient with zeros outside the given rows."""
    kept = gradient.new_zeros(gradient.shape)
    kept[rows] = gradient[rows]
    return kept


def parameter_groups(lm: nn.Module, weight_decay: float, lora_rank: int | None) -> list[dict]:
    """The trainable parameters for the optimizer; with adapters, tables with frozen rows are kept from decaying."""
    trainable = [p for p in lm.parameters() if p.requires_grad]
    if not lora_rank:
        return [{"params": trainable, "weight_decay": weight_decay}]
    tables = {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}
    groups = [
        {"params": [p for p in trainable if p not in tables], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p in tables], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def merged(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same; `weights` itself and the model stay."""
    plain = {name: value for name, value in weights.items() if ".lora_" not in name}
    for name, module in lm.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = plain.pop(f"{name}.base_layer.weight")
            plain[f"{name}.weight"] = base + module.get_delta_weight(ADAPTER).detach().to(base)
            if f"{name}.base_layer.bias" in plain:
                plain[f"{name}.bias"] = plain.pop(f"{name}.base_layer.bias")
    return plain
