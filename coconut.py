"""The Coconut model: thoughts fed back as input embeddings, and batched greedy generation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from components.activation_checkpointing import checkpoint_activations
from components.activations import fuse_gelu
from components.errors import reason
from components.export import DESCRIPTION, export, read_description
from components.kv_cache import BufferedLayer, causal_mask
from config import UserError
from curriculum import END, LATENT, START


@dataclass
class CoconutOutput:
    """The result of `Coconut.forward`.

    loss: mean cross entropy over the supervised positions, a scalar; None without labels.
    logits: (batch, length, vocabulary); None with labels.
    inputs_embeds: (batch, length, hidden), the input embeddings with the thoughts filled in.
    """

    loss: Tensor | None
    logits: Tensor | None
    inputs_embeds: Tensor


@dataclass
class BatchPlan:
    """The passes and the supervised positions of a batch: looked up on the CPU, so that nothing waits for a GPU.

    pass_starts: the columns at which a new pass begins, those with thoughts; rows, columns, targets: the supervised
    positions, each predicting the token in the column after it, (supervised,) each, empty without labels.
    """

    pass_starts: list[int]
    rows: Tensor
    columns: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> BatchPlan:
        """Return the plan with its tensors on a device; the copy is asynchronous."""
        tensors = (tensor.to(device, non_blocking=True) for tensor in (self.rows, self.columns, self.targets))
        return BatchPlan(self.pass_starts, *tensors)

    def pin_memory(self) -> BatchPlan:
        """Return the plan with its tensors in pinned memory."""
        return BatchPlan(self.pass_starts, *(t.pin_memory() for t in (self.rows, self.columns, self.targets)))


def plan_batch(input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None, latent_token_id: int) -> BatchPlan:
    """Plan the passes of (batch, length) sequences; fast if they are on the CPU.

    Raises ValueError for a thought at a row's first token, which has no hidden state before it.
    """
    is_latent = input_ids == latent_token_id  # (batch, length)
    if (is_latent & (attention_mask.cumsum(1) <= 1)).any():
        raise ValueError("a row begins with a latent token, which has no hidden state before it")
    labels = torch.full_like(input_ids, -100) if labels is None else labels
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # (supervised,) each
    return BatchPlan(is_latent.any(0).nonzero().flatten().tolist(), rows, columns, labels[rows, columns + 1])


class Coconut(nn.Module):
    """A causal language model whose latent tokens are continuous thoughts (paper, section 3).

    At a latent token the input embedding is the model's last hidden state (after its final norm) at the previous
    position, instead of a token embedding. Rows without latents are computed as in the plain model.

    The columns up to the first thought are computed in one pass, then one pass runs from each column with thoughts to
    the next (a single column where thoughts are consecutive), all over one KV cache. So a thought costs one column,
    however the rows are aligned, and gradients flow through all of them.

    Args:
        base_causallm: a causal language model of transformers; its tanh-approximated GELUs become fused ones, in place.
        latent_token_id, start_latent_id, end_latent_id, eos_token_id: ids of the tokens that sequences are made of.
    """

    def __init__(
        self, base_causallm, latent_token_id: int, start_latent_id: int, end_latent_id: int, eos_token_id: int
    ):
        super().__init__()
        fuse_gelu(base_causallm)
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.compiled = None  # set by `compile`
        self.description = {}  # the coconut.json that `from_pretrained` read

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        plan: BatchPlan | None = None,
    ) -> CoconutOutput:
        """Compute the loss of a batch, or its logits.

        Args:
            input_ids, attention_mask: (batch, length).
            labels: (batch, length), -100 where nothing is supervised. With labels, the vocabulary projection is
                computed at supervised positions only.
            position_ids: (batch, length); default: each row's real tokens are counted from 0.
            plan: the batch's `plan_batch`, if a prefetch worker has computed it.
        """
        plan = plan or plan_batch(input_ids, attention_mask, labels, self.latent_token_id)
        cache = self.new_cache(input_ids.shape[1])
        hidden, embeds = self.think(input_ids, attention_mask, position_ids, cache, plan.pass_starts)
        if labels is None:
            return CoconutOutput(None, self.logits(hidden), embeds)
        plan = plan.to(hidden.device)
        logits = self.logits(hidden[plan.rows, plan.columns])  # (supervised, vocabulary)
        total = F.cross_entropy(logits, plan.targets, reduction="sum")
        return CoconutOutput(total / max(len(plan.targets), 1), None, embeds)

    def think(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, cache, pass_starts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Run the model over (batch, length) sequences, filling in their thoughts and the empty cache.

        Returns the last hidden states and the input embeddings, both (batch, length, hidden).
        """
        if pass_starts and self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.modules()):
            advice = "turn it off, and use Coconut.checkpoint_activations"
            raise ValueError(f"transformers' gradient checkpointing drops the KV cache that thoughts need; {advice}")
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
        for start, end in pairwise([0, *pass_starts, input_ids.shape[1]]):
            columns = embeds[:, start:end]  # (batch, end - start, hidden)
            if start > 0:
                thought = self.thought(hidden[-1][:, -1:], len(hidden) - 1)  # (batch, 1, hidden)
                first = torch.where(is_latent[:, start, None, None], thought, columns[:, :1])  # (batch, 1, hidden)
                columns = torch.cat([first, columns[:, 1:]], dim=1)
            inputs.append(columns)
            states = self.hidden_states(columns, attention_mask[:, :end], position_ids[:, start:end], cache, backbone)
            hidden.append(states)  # (batch, end - start, hidden)
        return torch.cat(hidden, dim=1), torch.cat(inputs, dim=1)

    def thought(self, state: Tensor, number: int) -> Tensor:
        """Return what is fed back as the number-th thought, from 0: the last hidden state before it (batch, 1, hidden).

        A hook for subclasses that replace thoughts.
        """
        return state

    def hidden_states(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache, backbone: Callable
    ) -> Tensor:
        """Compute the last hidden states (batch, columns, hidden) of the columns that follow those in the cache.

        attention_mask: (batch, all columns). transformers would inspect its values to choose a kernel, and so wait for
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Project (..., hidden) states to the vocabulary.

        In the head's own float32, under autocast too: in bfloat16 a few percent of the greedy choices would differ.
        """
        head = self.base_causallm.get_output_embeddings()
        autocast = autocast_dtype(hidden.device) is not None
        with torch.autocast(hidden.device.type, enabled=False) if autocast else nullcontext():
            return head(hidden.to(head.weight.dtype))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int = 16,
        position_ids: Tensor | None = None,
        plan: BatchPlan | None = None,
    ) -> Tensor:
        """Decode greedily from a batch of prompts, padded on either side as the collator pads.

        Args:
            input_ids, attention_mask: (batch, length).
            max_new_tokens: the limit of new tokens per row.
            position_ids, plan: as in `forward`.

        Returns:
            (batch, <= length + max_new_tokens) token ids: the padded prompts, then the new tokens. A row ends before
            its first eos, or at the model's last position; it is filled with eos while other rows continue.
        """
        plan = plan or plan_batch(input_ids, attention_mask, None, self.latent_token_id)
        device = self.base_causallm.device
        input_ids, attention_mask = (t.to(device, non_blocking=True) for t in (input_ids, attention_mask))
        cache = self.new_cache(input_ids.shape[1] + max_new_tokens)
        hidden, _ = self.think(input_ids, attention_mask, position_ids, cache, plan.pass_starts)
        backbone = self.backbone()
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last_column = (columns * attention_mask).argmax(1)  # (batch,)
        rows = torch.arange(len(hidden), device=hidden.device)  # (rows,), those still being decoded
        last_hidden = hidden[rows, last_column]  # (rows, hidden)
        position = attention_mask.sum(1)  # (rows,), of each row's next token
        limit = getattr(self.base_causallm.config, "max_position_embeddings", None) or torch.inf
        finished = torch.zeros_like(position, dtype=torch.bool)  # (rows,)
        new = input_ids.new_full((len(input_ids), max_new_tokens), self.eos_token_id)  # (batch, max_new_tokens)
        for count in range(max_new_tokens):
            tokens = self.logits(last_hidden).argmax(-1)  # (rows,)
            finished |= (tokens == self.eos_token_id) | (position >= limit)
            unfinished = (~finished).nonzero().flatten()
            if len(unfinished) == 0:
                return torch.cat([input_ids, new[:, :count]], dim=1)
            if 2 * len(unfinished) <= len(rows):  # now dropping the finished rows pays
                cache.batch_select_indices(unfinished)
                rows, tokens, attention_mask, position, finished = (
                    t[unfinished] for t in (rows, tokens, attention_mask, position, finished)
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

    @torch.no_grad()
    def inputs_embeds(self, input_ids: Tensor) -> Tensor:
        """Return the input embeddings of one prompt with its thoughts filled in: (columns,) ids -> (columns, hidden).

        From these the plain model continues as this one does from the prompt.
        """
        input_ids = input_ids[None]  # (1, columns)
        attention_mask = torch.ones_like(input_ids)
        plan = plan_batch(input_ids, attention_mask, None, self.latent_token_id)
        _, embeds = self.think(input_ids, attention_mask, None, self.new_cache(input_ids.shape[1]), plan.pass_starts)
        return embeds[0]

    def new_cache(self, capacity: int) -> DynamicCache:
        """Return an empty cache for `capacity` columns; plain layers are buffered, others (sliding windows) are not.

        A compiled pass must not write into its inputs, so it gets transformers' own layers, which concatenate.
        Raises ValueError for models with recurrent layers, whose state absorbs the padding too.
        """
        cache = DynamicCache(config=self.base_causallm.config)
        if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
            raise ValueError("a model with recurrent layers has no KV cache, which thoughts need")
        if self.is_compiled:
            return cache
        cache.layers = [BufferedLayer(capacity) if type(x) is DynamicLayer else x for x in cache.layers]
        return cache

    def backbone(self) -> Callable:
        """Return the function that computes the passes of a batch: the model without its head, compiled or not."""
        backbone = without_head(self.base_causallm)
        return partial(self.compiled, cast_weights(backbone)) if self.is_compiled else backbone

    # --- set-up -------------------------------------------------------------------------------------------------------

    @classmethod
    def wrap(cls, lm, tokenizer) -> Coconut:
        """Wrap a language model whose tokenizer has the markers."""
        ids = (tokenizer.convert_tokens_to_ids(token) for token in (LATENT, START, END))
        return cls(lm, *ids, tokenizer.eos_token_id)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> Coconut:
        """Open a checkpoint, or what `save_pretrained` wrote: a folder or hub name; options go to transformers."""
        lm = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})
        description = read_description(folder, options.get("revision") or "main")
        if not description:
            remedy = "build Coconut(model, ...) with the ids of its markers"
            raise ValueError(f"{folder} has no {DESCRIPTION}, so it is not a Coconut checkpoint; {remedy}")
        ids = (description["token_ids"].get(token, -1) for token in (LATENT, START, END))
        model = cls(lm, *ids, description["eos_token_id"])
        model.description = description
        return model

    def save_pretrained(self, folder: str | Path, **description) -> None:
        """Write a folder that `from_pretrained` opens, and that thinks where transformers opens it; see `export`.

        description: further entries of its coconut.json, such as thoughts=6. The tokenizer is saved by its own method.
        """
        folder = Path(folder)
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} holds a model already; choose another folder")
        ids = {START: self.start_latent_id, END: self.end_latent_id, LATENT: self.latent_token_id}
        own = {"token_ids": ids, "thoughts": 0, "max_new_tokens": 128, "eos_token_id": self.eos_token_id}
        export(self.base_causallm, folder, own | self.description | description)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, whatever the architecture calls them: the longest list that is in no other one."""
        lists = [module for module in self.base_causallm.modules() if isinstance(module, nn.ModuleList)]
        inner = {module for outer in lists for module in outer.modules() if module is not outer}
        return max((module for module in lists if module not in inner), key=len)

    def checkpoint_activations(self, mode: str) -> None:
        """Recompute activations in the backward pass; see `components.activation_checkpointing`."""
        checkpoint_activations(self.blocks, mode)

    def compile(self, **options) -> None:
        """Compile the passes of training, with options of torch.compile; the first steps then take minutes.

        Shapes are symbolic, so a pass is compiled again only if it is of another kind: the first or a later one, of one
        column or several, of one row or several. Validation and generation are not compiled.
        """
        config = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, 16)  # with 8, some kinds would stay uncompiled
        config.optimize_ddp = False  # it would split every pass into a graph per gradient bucket
        backbone = without_head(self.base_causallm)

        def compute(weights: dict[str, Tensor], **inputs):
            return functional_call(backbone, weights, (), inputs) if weights else backbone(**inputs)

        self.compiled = torch.compile(compute, dynamic=True, **options)

    @property
    def is_compiled(self) -> bool:
        """Whether passes are compiled: in training, if `compile` was called."""
        return self.compiled is not None and torch.is_grad_enabled()


def without_head(lm: nn.Module) -> nn.Module:
    """Return the part of a model that computes its hidden states. (In transformers 4 Gemma 3 names itself as that.)"""
    return lm.get_decoder() if lm.base_model is lm else lm.base_model


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype in which autocast computes matrix products on a device; None if it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def cast_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of linear layers by name, as autocast would cast them; {} if it is off.

    Compiled passes get them as inputs: tracing disables autocast's weight cache, so each would cast and save them anew.
    """
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    dtype = autocast_dtype(next(module.parameters()).device)
    weights = {f"{name}.weight": m.weight.to(dtype) for name, m in linear.items()} if dtype else {}
    for weight in weights.values():
        torch._dynamo.mark_static(weight)  # its sizes are constants to compile for, as a parameter's are
    return weights


@torch.no_grad()
def check_model(lm: nn.Module, eos_token_id: int, source: str) -> None:
    """Raise UserError for a language model that Coconut would not compute correctly; source: names it in messages.

    Padded and in several passes with a cache it must give the same logits as alone and at once. That rules out
    recurrent models, positions that count padding, and logits that are more than the head of the last hidden state
    (scaled or capped, as in Gemma 2, Granite and Cohere).
    """
    was_training = lm.training
    model = Coconut(lm, -1, -1, -1, eos_token_id).eval()
    input_ids = torch.arange(6)[None] % len(lm.get_input_embeddings().weight)  # (1, 6)
    # Padded on the left as in training, and on the right before three tokens are decoded.
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]])  # (2, 8)
    padded = torch.full_like(attention_mask, eos_token_id)  # (2, 8)
    padded[attention_mask == 1] = input_ids.repeat(1, 2)[0]
    plan = replace(plan_batch(padded, attention_mask, None, -1), pass_starts=[5, 6, 7])
    complaint = f"{source}: {type(lm).__name__} cannot be trained with thoughts"
    try:
        expected = lm(input_ids=input_ids, use_cache=False).logits  # (1, 6, vocabulary)
        found = model(padded, attention_mask, plan=plan).logits[attention_mask == 1]  # (12, vocabulary)
    except Exception as error:  # a model's code may fail on a mask or a cache that it was not written for
        raise UserError(f"{complaint}: {reason(error)}") from error
    expected = expected.expand(2, -1, -1).flatten(0, 1)  # (12, vocabulary)
    if not torch.allclose(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item()):
        head = "its logits are not its head of the last hidden state"
        raise UserError(f"{complaint}: {head}, or padding or a KV cache changes them")
    lm.train(was_training)
