"""The Coconut model: thoughts fed back as input embeddings, and batched greedy generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from components.activation_checkpointing import recompute
from components.export import DESCRIPTION, export
from components.kv_cache import BufferedLayer, causal_mask
from curriculum import END, LATENT, START


@dataclass
class CoconutOutput:
    """What `Coconut.forward` returns.

    loss: mean cross entropy over the supervised positions, a scalar; None without labels.
    logits: (batch, length, vocabulary); None with labels.
    inputs_embeds: (batch, length, hidden), the embeddings that went in, thoughts in their places.
    """

    loss: Tensor | None
    logits: Tensor | None
    inputs_embeds: Tensor


@dataclass
class Plan:
    """What the passes and the loss of a batch are made of: looked up on the CPU, so that nothing waits for a GPU.

    cuts: the columns at which a new pass begins; rows, columns, targets: the supervised positions, each predicting the
    token in the column after it, (supervised,) each; none without labels.
    """

    cuts: list[int]
    rows: Tensor
    columns: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Plan:
        """The plan with its tensors on a device, without waiting for it."""
        return Plan(self.cuts, *(t.to(device, non_blocking=True) for t in (self.rows, self.columns, self.targets)))

    def pin_memory(self) -> Plan:
        """The plan with its tensors in pinned memory."""
        return Plan(self.cuts, *(t.pin_memory() for t in (self.rows, self.columns, self.targets)))


class Coconut(nn.Module):
    """A causal language model whose latent tokens are continuous thoughts (paper, section 3).

    At a latent token the input embedding is the model's last hidden state (after its final norm) at the position
    before, instead of a token's embedding. Rows without latents pass through as in the plain model.

    The columns up to the first thought are computed in one pass, then every stretch from one column with thoughts to
    the next (a single column where thoughts follow each other), all with a key-value cache. So a thought costs one
    column, whatever the alignment of the rows, and gradients flow through all of them.

    Args: any causal language model of transformers, and the ids of the tokens that the sequences are made of.
    """

    def __init__(
        self, base_causallm, latent_token_id: int, start_latent_id: int, end_latent_id: int, eos_token_id: int
    ):
        super().__init__()
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.compiled = None
        self.description = {}  # what `from_pretrained` found in coconut.json

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> Coconut:
        """Opens a checkpoint, or what `save_pretrained` wrote: a folder or hub name; options go to transformers."""
        lm = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})
        try:
            description = json.loads(Path(cached_file(folder, DESCRIPTION)).read_text(encoding="utf-8"))
        except OSError as error:
            remedy = "build Coconut(model, ...) with the ids of its markers"
            raise ValueError(f"{folder} has no {DESCRIPTION}, so it is no checkpoint of ours; {remedy}") from error
        if "eos_token_id" not in description:
            remedy = "build Coconut(model, ...) yourself, or train on with run.py, which saves it anew"
            raise ValueError(f"{folder}: {DESCRIPTION} was written by an earlier version; {remedy}")
        ids = (description["token_ids"].get(token, -1) for token in (LATENT, START, END))
        model = cls(lm, *ids, description["eos_token_id"])
        model.description = description
        return model

    def save_pretrained(self, folder: str | Path, **description) -> None:
        """Writes a folder that `from_pretrained` opens, and that thinks where transformers opens it; see `export`.

        description: what its coconut.json says besides, such as thoughts=6. The tokenizer is saved by its own method.
        """
        folder = Path(folder)
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} holds a model already; choose another folder")
        ids = {START: self.start_latent_id, END: self.end_latent_id, LATENT: self.latent_token_id}
        own = {"token_ids": ids, "thoughts": 0, "max_new_tokens": 128, "eos_token_id": self.eos_token_id}
        export(self.base_causallm, folder, own | self.description | description)

    def compile(self, **options) -> None:
        """Compiles the passes of training, with options of torch.compile; the first steps then take minutes.

        Shapes stay symbolic, so that a pass is compiled again only where it is of another kind: the first or a later
        one, of one column or several, of one row or several. Validation and generation are not compiled.
        """
        config = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, 16)  # with 8, some kinds would be left uncompiled
        config.optimize_ddp = False  # it would cut every pass into a graph for each bucket of gradients
        backbone = without_head(self.base_causallm)

        def compute(weights: dict[str, Tensor], **inputs):
            return functional_call(backbone, weights, (), inputs) if weights else backbone(**inputs)

        self.compiled = torch.compile(compute, dynamic=True, **options)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, whatever the architecture calls them: the longest list that is in no other one."""
        lists = [module for module in self.base_causallm.modules() if isinstance(module, nn.ModuleList)]
        inner = {module for outer in lists for module in outer.modules() if module is not outer}
        return max((module for module in lists if module not in inner), key=len)

    def recompute(self, mode: str) -> None:
        """Saves memory in training: blocks are computed again for the backward pass; see `cache.recompute`."""
        recompute(self.blocks, mode)

    def plan(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Plan:
        """Looks up what `forward` needs to know of (batch, length) sequences; quick if they lie on the CPU.

        Raises ValueError for a thought at a row's first token, which has no hidden state before it.
        """
        is_latent = input_ids == self.latent_token_id  # (batch, length)
        if (is_latent & (attention_mask.cumsum(1) <= 1)).any():
            raise ValueError("a latent token that is a row's first has no hidden state before it to take")
        labels = torch.full_like(input_ids, -100) if labels is None else labels
        rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # (supervised,) each
        return Plan(is_latent.any(0).nonzero().flatten().tolist(), rows, columns, labels[rows, columns + 1])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        plan: Plan | None = None,
        min_passes: int = 1,
    ) -> CoconutOutput:
        """One training pass.

        Args: input_ids, attention_mask, labels and position_ids, all (batch, length); labels are -100 where nothing is
        supervised; position_ids default to counting each row's real tokens. With labels, the vocabulary projection is
        computed only where it is supervised. plan: what `plan` found for this batch. min_passes cuts the columns into
        more stretches than the thoughts need, to the same effect: processes that gather sharded weights anew in every
        pass must make equally many.
        """
        plan = plan or self.plan(input_ids, attention_mask, labels)
        cache = self.new_cache(input_ids.shape[1])
        hidden, embeds = self.think(input_ids, attention_mask, position_ids, cache, plan.cuts, min_passes)
        if labels is None:
            return CoconutOutput(None, self.logits(hidden), embeds)
        plan = plan.to(hidden.device)
        logits = self.logits(hidden[plan.rows, plan.columns])  # (supervised, vocabulary)
        total = F.cross_entropy(logits, plan.targets, reduction="sum")
        return CoconutOutput(total / max(len(plan.targets), 1), None, embeds)

    def logits(self, hidden: Tensor) -> Tensor:
        """The vocabulary projection of (..., hidden) states.

        It keeps to its weights' float32 under autocast: in bfloat16 a few percent of the greedy choices would differ.
        """
        head = self.base_causallm.get_output_embeddings()
        autocast = autocast_dtype(hidden.device) is not None
        with torch.autocast(hidden.device.type, enabled=False) if autocast else nullcontext():
            return head(hidden.to(head.weight.dtype))

    def think(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, cache, cuts, min_passes: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Runs the model over (batch, length) sequences and fills in their thoughts and the empty cache.

        Returns the last hidden states and the input embeddings, both (batch, length, hidden).
        """
        if cuts and self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.modules()):
            advice = "turn it off, and use Coconut.recompute"
            raise ValueError(f"transformers' gradient checkpointing drops the cache that thoughts need; {advice}")
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (batch, length)
        input_ids, attention_mask, position_ids = (
            tensor.to(self.base_causallm.device, non_blocking=True)
            for tensor in (input_ids, attention_mask, position_ids)
        )
        is_latent = input_ids == self.latent_token_id  # (batch, length)
        embeds = self.base_causallm.get_input_embeddings()(input_ids)  # (batch, length, hidden)
        backbone = self.backbone()
        hidden, inputs = [], []
        for start, end in pairwise([0, *self.stretches(cuts, input_ids.shape[1], min_passes), input_ids.shape[1]]):
            stretch = embeds[:, start:end]
            if start > 0:
                thought = self.thought(hidden[-1][:, -1:], len(hidden) - 1)  # (batch, 1, hidden)
                first = torch.where(is_latent[:, start, None, None], thought, stretch[:, :1])
                stretch = torch.cat([first, stretch[:, 1:]], dim=1)
            inputs.append(stretch)
            states = self.hidden_states(stretch, attention_mask[:, :end], position_ids[:, start:end], cache, backbone)
            hidden.append(states)  # (batch, end - start, hidden)
        return torch.cat(hidden, dim=1), torch.cat(inputs, dim=1)

    def thought(self, state: Tensor, number: int) -> Tensor:
        """What is fed back at the number-th cut, from 0: the last hidden state before it, (batch, 1, hidden)."""
        return state

    @staticmethod
    def stretches(cuts: list[int], length: int, min_passes: int) -> list[int]:
        """The columns at which a new pass begins: the cuts, and the last columns to make up min_passes."""
        others = (column for column in range(length - 1, 0, -1) if column not in cuts)
        return sorted([*cuts, *islice(others, max(min_passes - 1 - len(cuts), 0))])

    def new_cache(self, capacity: int) -> DynamicCache:
        """An empty cache for `capacity` columns; its plain layers are buffered, others (sliding windows) stay.

        A compiled pass must not write into what it is given, so it gets transformers' own layers, which concatenate.
        Raises ValueError for models with recurrent layers, whose state takes in the padding too.
        """
        cache = DynamicCache(config=self.base_causallm.config)
        if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
            raise ValueError("a model with recurrent layers cannot take thoughts: it keeps no keys and values")
        if self.is_compiled:
            return cache
        cache.layers = [BufferedLayer(capacity) if type(x) is DynamicLayer else x for x in cache.layers]
        return cache

    @property
    def is_compiled(self) -> bool:
        """Whether passes are compiled: in training, if `compile` was called."""
        return self.compiled is not None and torch.is_grad_enabled()

    def backbone(self) -> Callable:
        """What computes the passes of a batch: the model without its head."""
        backbone = without_head(self.base_causallm)
        return partial(self.compiled, cast_weights(backbone)) if self.is_compiled else backbone

    def hidden_states(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache, backbone: Callable
    ) -> Tensor:
        """Last hidden states (batch, columns, hidden) of the columns that follow those in the cache.

        attention_mask (batch, all columns). transformers would look at its values to choose a kernel, and so wait for
        the GPU in every pass; plain attention gets a finished mask instead.
        """
        config = self.base_causallm.config
        plain = all(type(layer) in (BufferedLayer, DynamicLayer) for layer in cache.layers)
        if plain and config._attn_implementation == "sdpa" and not getattr(config, "alibi", False):
            dtype = autocast_dtype(inputs_embeds.device) or inputs_embeds.dtype
            attention_mask = causal_mask(attention_mask, inputs_embeds.shape[1], dtype)
        return backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    @torch.no_grad()
    def inputs_embeds(self, input_ids: Tensor) -> Tensor:
        """The input embeddings of one prompt with its thoughts filled in: (columns,) ids -> (columns, hidden).

        The plain model goes on from them as this one goes on from the prompt.
        """
        input_ids = input_ids[None]  # (1, columns)
        attention_mask = torch.ones_like(input_ids)
        cuts = self.plan(input_ids, attention_mask).cuts
        _, embeds = self.think(input_ids, attention_mask, None, self.new_cache(input_ids.shape[1]), cuts)
        return embeds[0]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int = 16,
        position_ids: Tensor | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        """Greedy continuation of a batch of prompts, padded on either side as the collator pads.

        Args: input_ids and attention_mask (batch, length), the number of new tokens at most, what `plan` found.
        Returns (batch, <= length + max_new_tokens) token ids: the padded prompts, then the new tokens. A row stops
        before its first eos, or where it fills the model's last position; eos follows there while other rows go on.
        """
        plan = plan or self.plan(input_ids, attention_mask)
        input_ids, attention_mask = (t.to(self.base_causallm.device) for t in (input_ids, attention_mask))
        cache = self.new_cache(input_ids.shape[1] + max_new_tokens)
        hidden, _ = self.think(input_ids, attention_mask, position_ids, cache, plan.cuts)
        backbone = self.backbone()
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_column = (columns * attention_mask).argmax(1)  # (batch,)
        rows = torch.arange(len(hidden), device=hidden.device)  # (rows,) those that are decoded
        last_hidden = hidden[rows, last_column]  # (rows, hidden)
        position = attention_mask.sum(1)  # (batch,) where each row's next token goes
        limit = getattr(self.base_causallm.config, "max_position_embeddings", None) or torch.inf
        finished = torch.zeros_like(position, dtype=torch.bool)  # (rows,)
        new = input_ids.new_full((len(input_ids), max_new_tokens), self.eos_token_id)  # (batch, max_new_tokens)
        for count in range(max_new_tokens):
            tokens = self.logits(last_hidden).argmax(-1)  # (rows,)
            finished |= (tokens == self.eos_token_id) | (position >= limit)
            going = (~finished).nonzero().flatten()
            if len(going) == 0:
                return torch.cat([input_ids, new[:, :count]], dim=1)
            if 2 * len(going) <= len(rows):  # now it pays to go on without those that have ended
                cache.batch_select_indices(going)
                rows, tokens, attention_mask, position, finished = (
                    t[going] for t in (rows, tokens, attention_mask, position, finished)
                )
            tokens = tokens.masked_fill(finished, self.eos_token_id)
            new[rows, count] = tokens
            if count + 1 == max_new_tokens:
                break
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
            embeds = self.base_causallm.get_input_embeddings()(tokens[:, None])  # (rows, 1, hidden)
            # A finished row may be past the last position; what it computes is never read.
            positions = position.masked_fill(finished, 0)[:, None]  # (rows, 1)
            last_hidden = self.hidden_states(embeds, attention_mask, positions, cache, backbone)[:, 0]
            position = position + 1
        return torch.cat([input_ids, new], dim=1)


def without_head(lm: nn.Module) -> nn.Module:
    """The part of a model that computes its hidden states. (In transformers 4 Gemma 3 names itself as that part.)"""
    return lm.get_decoder() if lm.base_model is lm else lm.base_model


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes matrix products in on a device; None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def cast_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers by name, as autocast would cast them; {} where it is off.

    Compiled passes get them: tracing turns autocast's memory off, so that each would cast and save them anew.
    """
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    dtype = autocast_dtype(next(module.parameters()).device)
    weights = {f"{name}.weight": m.weight.to(dtype) for name, m in linear.items()} if dtype else {}
    for weight in weights.values():
        torch._dynamo.mark_static(weight)  # its sizes are facts to compile for, as a parameter's are
    return weights
