"""A trained model whose thoughts can be read and replaced, and what it writes then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.graphs import Form, Graph, find_form
from build import inputs
from coconut import Coconut, without_head
from config import UserError
from curriculum import METHODS, num_placeholders
from dataset import MyCollator
from evaluate import Opened, open_checkpoint, predict, until_eos

SEED = 0  # of all that is drawn
NOISE = "noise of the thoughts' norm"  # how rows call the control that `noise` makes


class Replaceable(Coconut):
    """Coconut that can be given thoughts from outside: those that are forced, of (batch, thoughts, hidden) values.

    A thought after a forced one is computed anew from it, unless it is forced, too.
    """

    values: Tensor | None = None
    forced: Sequence[bool] = ()

    def thought(self, state: Tensor, number: int) -> Tensor:
        """The given thought where it is forced, (batch, 1, hidden)."""
        if self.values is None or not self.forced[number]:
            return state
        return self.values[:, number : number + 1].to(state)

    @contextmanager
    def replacing(self, values: Tensor | None, forced: Sequence[bool]) -> Iterator[None]:
        """Thinks with these thoughts, of the rows of one batch, as long as it lasts."""
        self.values, self.forced = values, forced
        try:
            yield
        finally:
            self.values, self.forced = None, ()


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the problems that it is asked; name: how rows and figures call it.

    thoughts: how many thoughts or pauses its prompts hold, the same for all problems, so that they stand in the same
    columns of every batch; forms, graphs: of the problems, None where one states no graph.
    """

    name: str
    opened: Opened
    problems: list[dict]
    forms: list[Form | None]
    graphs: list[Graph | None]
    batch_size: int
    thoughts: int

    @property
    def model(self) -> Replaceable:
        """The model."""
        return self.opened.model

    @property
    def thinks(self) -> bool:
        """Whether its placeholders are continuous thoughts."""
        return METHODS[self.opened.config.method].placeholder == "latent"

    @property
    def has_placeholders(self) -> bool:
        """Whether its prompts hold thoughts or pauses at all."""
        return METHODS[self.opened.config.method].placeholder is not None

    @property
    def per_stage(self) -> int:
        """Thoughts that took the place of one step in training."""
        return max(self.opened.config.c_thought, 1)

    @property
    def placeholder_id(self) -> int:
        """The id of a thought, or of a pause."""
        return self.opened.pretrained.prompt_ids(self.opened.config.method)[1]

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model takes; None: any."""
        return self.opened.positions

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text that is written behind a prompt."""
        return self.opened.pretrained.tokenizer(text, add_special_tokens=False)["input_ids"]

    def with_thoughts(self, thoughts: int) -> Subject:
        """The same with so many thoughts in its prompts."""
        return replace(self, thoughts=thoughts)

    @cached_property
    def prompts(self) -> list[dict]:
        """The prompts of all problems."""
        opened = self.opened.with_thoughts(self.thoughts) if self.has_placeholders else self.opened
        return opened.prompts([problem["question"] for problem in self.problems])

    def batches(self, items: list[dict], title: str) -> Iterator[tuple[list[int], dict]]:
        """Items of similar length together: their indices, and the padded batch. Raises UserError for one that is
        longer than the model takes."""
        longest = max((len(item["input_ids"]) for item in items), default=0)
        if self.positions and longest > self.positions:
            raise UserError(f"{title}: a sequence has {longest} tokens, {self.opened.path} takes {self.positions}")
        collate = MyCollator(self.opened.pretrained.tokenizer, self.model.latent_token_id)
        order = sorted(range(len(items)), key=lambda index: len(items[index]["input_ids"]))
        parts = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for part in tqdm(parts, desc=f"{self.name}: {title}", leave=False, disable=len(parts) < 2):
            yield part, collate([items[index] for index in part])


def open_subject(path: str, problems: list[dict], batch_size: int) -> Subject:
    """Opens a checkpoint to ask it problems with as many thoughts as its stage has."""
    opened = open_checkpoint(path)
    own, config = opened.model, opened.config
    ids = (own.latent_token_id, own.start_latent_id, own.end_latent_id, own.eos_token_id)
    opened = replace(opened, model=Replaceable(own.base_causallm, *ids).eval())
    thoughts = num_placeholders(opened.stage, 0, config, training=False)
    forms = [find_form(problem) for problem in problems]
    graphs = [form and form.graph(problem) for form, problem in zip(forms, problems, strict=True)]
    return Subject(config.method, opened, problems, forms, graphs, batch_size, thoughts)


@torch.no_grad()
def think(subject: Subject, batch: dict, values: Tensor | None = None, forced: Sequence[bool] = ()):
    """Last hidden states and input embeddings, (batch, length, hidden) each, of a batch of sequences.

    values: thoughts of its rows, (batch, thoughts, hidden); forced: which of them take the place of the model's own.
    """
    model = subject.model
    cuts = model.plan(batch["input_ids"], batch["attention_mask"]).cuts
    with model.replacing(values, forced):
        cache = model.new_cache(batch["input_ids"].shape[1])
        return model.think(batch["input_ids"], batch["attention_mask"], batch["position_ids"], cache, cuts)


@torch.no_grad()
def look(subject: Subject, batch: dict, **outputs: bool):
    """What transformers returns of one pass over a batch with its thoughts in their places; outputs: what it is asked
    for, such as output_attentions=True."""
    _, embeds = think(subject, batch)
    mask, position_ids = (batch[key].to(embeds.device) for key in ("attention_mask", "position_ids"))
    return without_head(subject.model.base_causallm)(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False, **outputs
    )


def read_thoughts(subject: Subject, values: Tensor | None = None, forced: Sequence[bool] = ()) -> Tensor:
    """The thoughts of all problems, (problems, thoughts, hidden) on the CPU; values as for `think`, of all problems."""
    hidden = subject.model.base_causallm.get_input_embeddings().weight.shape[1]
    found = torch.zeros(len(subject.problems), subject.thoughts, hidden)  # (problems, thoughts, hidden)
    for part, batch in subject.batches(subject.prompts, "thoughts"):
        _, embeds = think(subject, batch, None if values is None else values[part], forced)
        is_latent = batch["input_ids"] == subject.model.latent_token_id  # (batch, length)
        found[part] = embeds.cpu().float()[is_latent].view(len(part), subject.thoughts, hidden)
    return found


def noise(thoughts: Tensor) -> Tensor:
    """Random directions of the norms of thoughts (problems, thoughts, hidden), the same ones for the same shape."""
    drawn = torch.randn(thoughts.shape, generator=torch.Generator().manual_seed(SEED))  # (problems, thoughts, hidden)
    return drawn * thoughts.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)


def write_answers(
    subject: Subject, title: str, values: Tensor | None = None, forced: Sequence[bool] = (), begun: Sequence[int] = ()
) -> list[dict]:
    """What the model writes to every problem, in their order, and its `ids`; see `evaluate.predict`. Greedy, as in
    validation.

    values, forced: thoughts of all problems, as for `read_thoughts`; begun: ids that every answer starts with.
    """
    opened = subject.opened
    limit, eos = opened.config.answer_limit, subject.model.eos_token_id
    predictions = [None] * len(subject.problems)
    for part, batch in subject.batches([extended(item, begun) for item in subject.prompts], title):
        with subject.model.replacing(None if values is None else values[part], forced):
            output = subject.model.generate(**inputs(batch), max_new_tokens=limit)  # (batch, length + new)
        for index, tokens in zip(part, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            new = [*begun, *until_eos(tokens, eos, limit)]
            said = predict(subject.problems[index], index, new, 0, opened.pretrained.tokenizer, opened.config.method)
            thoughts = subject.thoughts if subject.thinks else 0  # pauses are no generated tokens
            predictions[index] = said | {"new_tokens": thoughts + len(new), "ids": new}
    return predictions


def extended(item: dict, tokens: Sequence[int]) -> dict:
    """A prompt with tokens behind it."""
    ids = [*item["input_ids"], *tokens]
    return item | {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids)))}


@torch.no_grad()
def log_probabilities(
    subject: Subject, items: list[dict], scored: list[int], title: str, values: Tensor | None = None
) -> list[float]:
    """For every sequence the log probability of its last tokens, as many as `scored` says of each.

    A sequence is a prompt with tokens behind it; see `extended`. values: thoughts in place of its own, (sequences,
    thoughts, hidden).
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
