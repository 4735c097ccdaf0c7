"""A trained model whose thoughts can be read and replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.graphs import Form, Graph, find_form
from coconut import Coconut, plan_batch, without_head
from config import Config, UserError
from curriculum import METHODS, last_stage, num_placeholders
from dataset import MyCollator, model_args
from evaluate import OpenedCheckpoint, open_checkpoint, predict, until_eos

SEED = 0
NOISE = "noise of the thoughts' norm"  # label of this control in tables


class Replaceable(Coconut):
    """Coconut with replaceable thoughts: those that are `forced` take `values` (batch, thoughts, hidden).

    A thought after a forced one is recomputed from it, unless it is forced too.
    """

    values: Tensor | None = None
    forced: Sequence[bool] = ()

    def thought(self, state: Tensor, number: int) -> Tensor:
        """Return the given value of a forced thought, (batch, 1, hidden)."""
        if self.values is None or not self.forced[number]:
            return state
        return self.values[:, number : number + 1].to(state)

    @contextmanager
    def replacing(self, values: Tensor | None, forced: Sequence[bool]) -> Iterator[None]:
        """Replace thoughts of one batch within this context."""
        self.values, self.forced = values, forced
        try:
            yield
        finally:
            self.values, self.forced = None, ()


@dataclass(frozen=True)
class Subject:
    """A checkpoint with the problems it is evaluated on.

    name: in rows and figures; thoughts: number of thoughts or pause tokens per prompt, the same for all problems, so
    that they are in the same columns of a batch; forms, graphs: per problem, None without a graph.
    """

    name: str
    checkpoint: OpenedCheckpoint
    problems: list[dict]
    forms: list[Form | None]
    graphs: list[Graph | None]
    batch_size: int
    thoughts: int

    @property
    def model(self) -> Replaceable:
        return self.checkpoint.model

    @property
    def thinks(self) -> bool:
        """Whether the placeholders are continuous thoughts."""
        return METHODS[self.checkpoint.config.method].placeholder == "latent"

    @property
    def has_placeholders(self) -> bool:
        """Whether prompts contain thoughts or pause tokens."""
        return METHODS[self.checkpoint.config.method].placeholder is not None

    @property
    def per_stage(self) -> int:
        """Thoughts per replaced step in training."""
        return max(self.checkpoint.config.c_thought, 1)

    @property
    def placeholder_id(self) -> int:
        """Token id of a thought or pause token."""
        return self.checkpoint.pretrained.sequence_tokens(self.checkpoint.config.method)["latent_id"]

    @property
    def positions(self) -> int | None:
        """Maximum sequence length of the model; None: unlimited."""
        return self.checkpoint.positions

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a text that follows a prompt."""
        return self.checkpoint.pretrained.tokenizer(text, add_special_tokens=False)["input_ids"]

    def with_thoughts(self, thoughts: int) -> Subject:
        """Return a copy with another number of thoughts."""
        return replace(self, thoughts=thoughts)

    def with_question_alone(self) -> Subject:
        """Return a copy whose prompts are those of no_cot: the question without markers and thoughts."""
        config = Config({"method": "no_cot", "max_new_tokens": self.checkpoint.config.max_new_tokens})
        return replace(self, thoughts=0, checkpoint=replace(self.checkpoint, config=config, stage=last_stage(config)))

    @property
    def run(self) -> str:
        """Run directory and checkpoint, as titles name them."""
        place = Path(self.checkpoint.path).resolve()
        return f"{place.parent.name}/{place.name} ({self.checkpoint.config.method})"

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing; known where each question has two options."""
        return 0.5 if all(self.graphs) else None

    @cached_property
    def prompts(self) -> list[dict]:
        """The prompts of all problems."""
        checkpoint = self.checkpoint.with_thoughts(self.thoughts) if self.has_placeholders else self.checkpoint
        return checkpoint.prompts([problem["question"] for problem in self.problems])

    def batches(self, items: list[dict], title: str) -> Iterator[tuple[list[int], dict]]:
        """Yield padded batches of items of similar length, with their indices.

        Raises: UserError if a sequence exceeds the model's positions.
        """
        longest = max((len(item["input_ids"]) for item in items), default=0)
        if self.positions and longest > self.positions:
            raise UserError(
                f"{title}: a sequence has {longest} tokens, but {self.checkpoint.path} has {self.positions} positions"
            )
        collate = MyCollator(self.checkpoint.pretrained.tokenizer, self.model.latent_token_id)
        order = sorted(range(len(items)), key=lambda index: len(items[index]["input_ids"]))
        parts = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for part in tqdm(parts, desc=f"{self.name}: {title}", leave=False, disable=len(parts) < 2 or None):
            yield part, collate([items[index] for index in part])


def open_subject(path: str, problems: list[dict], batch_size: int) -> Subject:
    """Open a checkpoint, with as many thoughts as in its training stage."""
    checkpoint = open_checkpoint(path)
    own, config = checkpoint.model, checkpoint.config
    ids = (own.latent_token_id, own.start_latent_id, own.end_latent_id, own.eos_token_id)
    checkpoint = replace(checkpoint, model=Replaceable(own.base_causallm, *ids).eval())
    thoughts = num_placeholders(checkpoint.stage, 0, config, training=False)
    forms = [find_form(problem) for problem in problems]
    graphs = [form and form.graph(problem) for form, problem in zip(forms, problems, strict=True)]
    return Subject(config.method, checkpoint, problems, forms, graphs, batch_size, thoughts)


@torch.no_grad()
def think(subject: Subject, batch: dict, values: Tensor | None = None, forced: Sequence[bool] = ()):
    """Compute last hidden states and input embeddings, (batch, length, hidden) each.

    values: replacements (batch, thoughts, hidden) for the thoughts that are `forced`.
    """
    model = subject.model
    plan = plan_batch(batch["input_ids"], batch["attention_mask"], None, model.latent_token_id)
    with model.replacing(values, forced):
        cache = model.new_cache(batch["input_ids"].shape[1])
        return model.think(batch["input_ids"], batch["attention_mask"], batch["position_ids"], cache, plan.pass_starts)


@torch.no_grad()
def look(subject: Subject, batch: dict, **outputs: bool):
    """Run one pass over a batch with its thoughts in place; outputs: such as output_attentions=True."""
    _, embeds = think(subject, batch)
    mask, position_ids = (batch[key].to(embeds.device) for key in ("attention_mask", "position_ids"))
    return without_head(subject.model.base_causallm)(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False, **outputs
    )


def read_thoughts(subject: Subject, values: Tensor | None = None, forced: Sequence[bool] = ()) -> Tensor:
    """Compute the thoughts of all problems, (problems, thoughts, hidden) on the CPU; values, forced: as for `think`."""
    hidden = subject.model.base_causallm.get_input_embeddings().weight.shape[1]
    found = torch.zeros(len(subject.problems), subject.thoughts, hidden)  # (problems, thoughts, hidden)
    for part, batch in subject.batches(subject.prompts, "thoughts"):
        _, embeds = think(subject, batch, None if values is None else values[part], forced)
        is_latent = batch["input_ids"] == subject.model.latent_token_id  # (batch, length)
        found[part] = embeds.cpu().float()[is_latent].view(len(part), subject.thoughts, hidden)
    return found


def noise(thoughts: Tensor) -> Tensor:
    """Draw random directions with the norms of thoughts (problems, thoughts, hidden); deterministic."""
    drawn = torch.randn(thoughts.shape, generator=torch.Generator().manual_seed(SEED))  # (problems, thoughts, hidden)
    return drawn * thoughts.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)


def write_answers(
    subject: Subject, title: str, values: Tensor | None = None, forced: Sequence[bool] = (), begun: Sequence[int] = ()
) -> list[dict]:
    """Generate an answer to each problem as in validation (greedy); return predictions with the generated `ids`.

    values, forced: as for `read_thoughts`; begun: ids that each answer starts with.
    """
    checkpoint = subject.checkpoint
    limit, eos = checkpoint.config.answer_limit, subject.model.eos_token_id
    predictions = [None] * len(subject.problems)
    for part, batch in subject.batches([extended(item, begun) for item in subject.prompts], title):
        with subject.model.replacing(None if values is None else values[part], forced):
            output = subject.model.generate(**model_args(batch), max_new_tokens=limit)  # (batch, length + new)
        for index, tokens in zip(part, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            new = [*begun, *until_eos(tokens, eos, limit)]
            tokenizer = checkpoint.pretrained.tokenizer
            prediction = predict(subject.problems[index], index, new, 0, tokenizer, checkpoint.config)
            thoughts = subject.thoughts if subject.thinks else 0  # pause tokens are not counted as generated
            predictions[index] = prediction | {"new_tokens": thoughts + len(new), "ids": new}
    return predictions


def extended(item: dict, tokens: Sequence[int]) -> dict:
    """Append tokens to a prompt."""
    ids = [*item["input_ids"], *tokens]
    return item | {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids)))}


@torch.no_grad()
def log_probabilities(
    subject: Subject, items: list[dict], scored: list[int], title: str, values: Tensor | None = None
) -> list[float]:
    """Compute the log probability of the last `scored[i]` tokens of each sequence i.

    items: prompts with tokens appended (`extended`); values: replacements for all thoughts, (sequences, thoughts,
    hidden).
    """
    found = [0.0] * len(items)
    for part, batch in subject.batches(items, title):
        given = (None, ()) if values is None else (values[part], [True] * subject.thoughts)
        hidden, _ = think(subject, batch, *given)
        columns = torch.arange(batch["input_ids"].shape[1])  # (length,)
        last = (columns * batch["attention_mask"]).argmax(1)  # (batch,), the column of each row's last token
        counts = torch.tensor([scored[index] for index in part])  # (batch,)
        behind = (columns > (last - counts)[:, None]) & (columns <= last[:, None])  # (batch, length), what is scored
        rows, places = behind.nonzero(as_tuple=True)  # (scored tokens,) each
        scores = subject.model.logits(hidden[rows, places - 1]).log_softmax(-1)  # (scored tokens, vocabulary)
        own = scores.cpu().gather(1, batch["input_ids"][rows, places][:, None])[:, 0]  # (scored tokens,)
        for index, of_row in zip(part, own.split(counts.tolist()), strict=True):
            found[index] = of_row.sum().item()
    return found
