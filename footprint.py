"""The memory that a training step takes on each GPU: an estimate by arithmetic, before the first step is made.

benchmarks/memory.py simulates the step itself; the tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from itertools import pairwise

from torch import nn

from coconut import Coconut
from components.activation_checkpointing import MIN_CHECKPOINTED_COLUMNS

FLOAT32, BFLOAT16 = 4, 2  # bytes
MOMENTS = 2  # of a weight, that AdamW keeps


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU at the peak of a training step, by part.

    weights: what the GPU holds of them from step to step; gathered: copies of them for arithmetic (whole ones under
    fsdp, bfloat16 ones under autocast); gradients: with those that wait for passes still to come; optimizer: AdamW's
    two moments; activations: the rest.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in vars(self).items())
        return f"{self.total / 2**30:.1f} GiB ({parts})"


@dataclass(frozen=True)
class Step:
    """A training step as one of several GPUs makes it.

    strategy: ddp or fsdp (one GPU needs neither); keep_weights: whether fsdp gathers weights once in a step, or anew in
    every pass. rows, columns: the shape of the largest batch; thoughts, supervised: how many of its columns are such.
    bf16 and gradient_checkpointing are the config's. accumulate: whether the step has several batches.
    """

    strategy: str
    world_size: int
    rows: int
    columns: int
    thoughts: int
    supervised: int
    bf16: bool = False
    gradient_checkpointing: bool | str = False
    keep_weights: bool = True
    accumulate: bool = False

    @property
    def sharded(self) -> bool:
        """Whether every GPU has a share of the model."""
        return self.strategy == "fsdp" and self.world_size > 1

    @property
    def copied(self) -> bool:
        """Whether every GPU has a copy of the model."""
        return self.strategy == "ddp" and self.world_size > 1

    @property
    def word(self) -> int:
        """Bytes of a number in the blocks' matrix products."""
        return BFLOAT16 if self.bf16 else FLOAT32

    @property
    def passes(self) -> list[tuple[int, int]]:
        """The columns of each pass, and all that it sees: the question, a pass for each thought, the answer."""
        question = max(self.columns - self.thoughts - self.supervised, 1)
        cuts = [0, *range(question, question + self.thoughts), self.columns]
        return [(end - start, end) for start, end in pairwise(cuts)]


def estimate(model: Coconut, step: Step) -> Footprint:
    """What a training step takes at its peak; the model is only read, before it is shared out, and may lie on `meta`.

    What CUDA and its allocator take beside tensors comes on top.
    """
    shards = step.world_size if step.sharded else 1
    weights, trained = sum(p.nbytes for p in model.parameters()), FLOAT32 * count(model.parameters(), trained=True)
    gathered, gradients, activations = max(moments(model, step, trained // shards), key=sum)
    return Footprint(weights // shards, gathered, gradients, MOMENTS * trained // shards, activations)


def moments(model: Coconut, step: Step, final: int) -> list[tuple[int, int, int]]:
    """Bytes of gathered weights, gradients and activations when they may be at their peak.

    final: those of the gradients that a step ends with.
    """
    layers, kept = len(model.blocks), Kept.by(model, step)
    every, first = (layers * kept.bytes(passes, step) for passes in (step.passes, step.passes[:1]))
    again = kept.bytes(step.passes[:1], replace(step, gradient_checkpointing=False)) - first // layers  # of one block
    again += kept.mlp * step.rows * step.passes[0][0] // 2  # and, roughly, gradients inside its MLP
    # Embeddings, those with thoughts among them, and last hidden states.
    states = 3 * FLOAT32 * step.rows * step.columns * kept.hidden
    head = model.base_causallm.get_output_embeddings().weight
    logits = FLOAT32 * step.rows * step.supervised * len(head)

    # DDP's buckets, of which gradients are views, and the sum over earlier batches are there all the time.
    before = final if step.copied or step.accumulate else 0
    # Autograd hands on a gradient when all passes have added to it; those of all blocks wait for the first pass's.
    blocks = count(model.blocks.parameters(), trained=True)
    waiting = step.word * (blocks if step.thoughts else blocks // layers)
    begun = before + FLOAT32 * count([head], trained=True) + waiting  # the head's comes first
    # Under fsdp, those of a block leave for their shards in float32.
    leaving = FLOAT32 * blocks // layers if step.sharded else 0

    gathered = gathered_bytes(model, step)
    at_end = 0 if not step.sharded else gathered if step.keep_weights else FLOAT32 * outside(model)
    return [
        # The loss: log-probabilities, their gradient, and that of the logits.
        (gathered, before, every + states + 3 * logits),
        # The first pass's backward pass begins, in which its activations make room for gradients, block by block.
        (gathered, begun, first + states + again),
        (gathered, begun + leaving, first - first // layers + states + again),
        # Its end, where the embedding's gradient comes last, and the blocks' copies are gone unless they are kept.
        (at_end, max(before, final) + table_gradients(model, step), 0),
    ]


def gathered_bytes(model: Coconut, step: Step) -> int:
    """Copies of weights for arithmetic."""
    blocks = count(p for p in model.blocks.parameters() if p.element_size() == FLOAT32)  # others are as bf16 needs them
    if step.sharded:  # what is outside the blocks stays and is float32; of the blocks, all or the present and next one
        share = blocks if step.keep_weights else 2 * blocks // len(model.blocks)
        return FLOAT32 * outside(model) + step.word * share
    return step.word * blocks if step.bf16 else 0  # autocast's, which all passes share


def table_gradients(model: Coconut, step: Step) -> int:
    """What embedding and head have more than their final gradients at the end of the backward pass."""
    lm = model.base_causallm
    table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    alone = not (step.sharded or step.copied)  # then one of these is the final one
    # Of a shared table, the gradients of both uses and their sum. Else that of the embedding, which comes last; but
    # under fsdp both wait for each other, and leave together.
    tables = 3 - alone if table is head else 4 if step.sharded else 1 - alone
    return FLOAT32 * tables * count([table], trained=True)


def count(parameters: Iterable[nn.Parameter], trained: bool = False) -> int:
    """The number of weights, or of those that are trained."""
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def outside(model: Coconut) -> int:
    """The number of weights outside the blocks."""
    return count(model.parameters()) - count(model.blocks.parameters())


@dataclass(frozen=True)
class Kept:
    """What a block keeps for the backward pass: bytes for each token, by part.

    stream: the residual stream and norms; attention and mlp: inputs and outputs of their linear layers, and what lies
    between; cache: keys and values; repeated: keys and values, once for every head, of each token that a pass sees.
    """

    hidden: int  # width of the model, not bytes
    stream: int
    attention: int
    mlp: int
    cache: int
    repeated: int

    @classmethod
    def by(cls, model: Coconut, step: Step) -> Kept:
        """What the model's blocks keep."""
        config, block = model.base_causallm.config.get_text_config(), model.blocks[0]
        hidden, heads = config.hidden_size, config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or hidden // heads
        queries, keys_and_values = heads * width, 2 * key_heads * width
        matrices = [p for name, p in block.named_parameters() if p.ndim == 2 and ".lora_" not in name]
        inner = max(max(p.shape) for p in matrices)  # the MLP's width
        fused = len(matrices) == 4  # GPT-2: one layer for queries, keys and values, and no gate
        # Layers with the same input share it, but autocast casts it for each of them.
        attended, gates = (1, 1) if fused else (3, 2)
        casts = (attended, gates) if step.bf16 and not step.sharded else (1, 1)
        norms = 2 if any(isinstance(m, nn.LayerNorm) for m in block.modules()) else 4  # with those of an RMSNorm
        # The input and the output (and the queries); the fused layer's output holds keys and values, too.
        attention = hidden * casts[0] + 2 * queries + (keys_and_values if fused else 0)
        mlp = hidden * casts[1] + 2 * gates * inner  # what goes in, comes out of a layer, and out of the activation
        # transformers' gelu_new is written in single operations, three of which keep something in float32.
        gelu = 3 * FLOAT32 * inner if getattr(config, "activation_function", None) == "gelu_new" else 0
        return cls(
            hidden=hidden,
            stream=FLOAT32 * norms * hidden,
            attention=step.word * attention,
            mlp=step.word * mlp + gelu,
            cache=step.word * keys_and_values,
            repeated=step.word * 2 * queries if key_heads < heads else 0,
        )

    def bytes(self, passes: list[tuple[int, int]], step: Step) -> int:
        """What a block keeps of some passes of a step."""
        return step.rows * sum(self.row_bytes(columns, seen, step.gradient_checkpointing) for columns, seen in passes)

    def row_bytes(self, columns: int, seen: int, checkpointing: bool | str) -> int:
        """What a block keeps of a row of `columns` tokens that see `seen` ones."""
        checkpointing = checkpointing if columns >= MIN_CHECKPOINTED_COLUMNS else False
        entry = FLOAT32 * self.hidden  # the states that go into what is computed again
        if checkpointing == "block":
            return columns * (entry + self.cache)
        repeated = self.repeated * seen if columns > 1 else 0  # a single column attends without
        mlp = entry if checkpointing == "mlp" else self.mlp
        return columns * (self.stream + self.attention + self.cache + mlp) + repeated
