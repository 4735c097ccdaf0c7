"""The generate function of an exported checkpoint, which thinks under transformers' trust_remote_code=True.

transformers copies only this file and calls its `generate` instead of the model's own, so it imports no other module.
"""

import json
import re
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.utils import cached_file


@torch.no_grad()
def generate(inputs=None, *args, model, input_ids=None, attention_mask=None, thoughts=None, **options):
    """Append markers and thoughts to prompts, fill in the thoughts, and generate as transformers does.

    Args:
        inputs or input_ids, attention_mask: (batch, length), padded on either side; prompts end as in training, in
            "question\\n".
        thoughts: their number, by default that of coconut.json.
        args, options: those of transformers' `generate`.

    Returns:
        What `generate` returns: the prompts with markers and thoughts, padded on the left, then the new tokens.
    """
    input_ids = inputs if input_ids is None else input_ids
    if input_ids is None or options.get("inputs_embeds") is not None:
        raise ValueError("a checkpoint that thinks generates from input_ids, not from inputs_embeds")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    commit = Path(__file__).parents[1].name  # transformers puts the code of a hub model into a folder of this name
    revision = commit if re.fullmatch("[0-9a-f]{40}", commit) else "main"
    path = cached_file(model.name_or_path, "coconut.json", revision=revision)
    description = json.loads(Path(path).read_text(encoding="utf-8"))
    thoughts = description["thoughts"] if thoughts is None else thoughts
    ids = description["token_ids"]
    middle = []
    if ids:
        if torch.isin(input_ids, input_ids.new_tensor(list(ids.values()))).any():
            raise ValueError(f"a prompt contains one of {', '.join(ids)}, which only this function may insert")
        start, end, placeholder = ids.values()
        middle = [start, *[placeholder] * thoughts, end]
    input_ids, attention_mask = append(input_ids.to(model.device), attention_mask.to(model.device), middle)
    embeds = model.get_input_embeddings()(input_ids)  # (batch, length + len(middle), hidden)
    if "<|latent|>" in ids:
        think(model, embeds, attention_mask, thoughts)
    options.pop("token_type_ids", None)  # of tokenizers of transformers 4; training has none
    options.pop("custom_generate", None)  # where it names this file to a model that has it already
    return type(model).generate(model, input_ids, *args, inputs_embeds=embeds, attention_mask=attention_mask, **options)


def append(input_ids, attention_mask, middle):
    """Append the tokens `middle` to prompts and their mask, (batch, length) each, and move all padding to the left."""
    order = attention_mask.argsort(dim=1, stable=True)  # (batch, length), padding first
    input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
    added = input_ids.new_tensor(middle).expand(len(input_ids), -1)  # (batch, len(middle))
    return torch.cat([input_ids, added], dim=1), torch.cat([attention_mask, torch.ones_like(added)], dim=1)


def think(model, embeds, attention_mask, thoughts):
    """Fill the thoughts, in the columns before the last one, into embeds (batch, length, hidden).

    Each is the last hidden state, after the final norm, of the previous column.
    """
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (batch, length)
    body = model.get_decoder() if model.base_model is model else model.base_model  # transformers 4's Gemma 3: itself
    cache, done, end = DynamicCache(config=model.config), 0, embeds.shape[1] - 1
    for column in range(end - thoughts, end):
        hidden = body(
            inputs_embeds=embeds[:, done:column],
            attention_mask=attention_mask[:, :column],
            position_ids=position_ids[:, done:column],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (batch, column - done, hidden)
        embeds[:, column], done = hidden[:, -1], column
