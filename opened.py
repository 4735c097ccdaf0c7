"""A checkpoint opened for questions: its model, and the prompts that it was trained to answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from coconut import Coconut
from config import Config, UserError
from curriculum import METHODS
from dataset import get_question_latent_dataset
from export import DESCRIPTION
from pretrained import Pretrained, load_pretrained, read_description
from tokens import tokenize_chunk


@dataclass
class Opened:
    """A checkpoint, and the config and stage by which its prompts are made; path: as the user gave it."""

    path: str
    pretrained: Pretrained
    model: Coconut
    config: Config
    stage: int

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model takes; None: any."""
        return getattr(self.pretrained.lm.config, "max_position_embeddings", None)

    def with_thoughts(self, thoughts: int) -> Opened:
        """The same with so many thoughts or pauses in its prompts. Raises UserError for a method that has none."""
        method = self.config.method
        if not METHODS[method].placeholder:
            raise UserError(f"--thoughts: {self.path} was trained with method {method}, which has none")
        values = {"method": method, "c_thought": 1, "max_latent_stage": thoughts}
        return replace(self, config=Config(values | {"max_new_tokens": self.config.max_new_tokens}), stage=thoughts)

    def prompts(self, questions: list[str]) -> list[dict]:
        """The prompts as validation makes them: input_ids, attention_mask, position_ids, idx. Raises UserError where
        the model has too few positions."""
        tokenizer, method = self.pretrained.tokenizer, self.config.method
        problems = [{"question": question, "answer": "", "steps": []} for question in questions]
        columns = tokenize_chunk(problems, 0, tokenizer)
        examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        ids, plain = self.pretrained.prompt_ids(method), not METHODS[method].markers
        prompts = get_question_latent_dataset(self.stage, [], self.config, *ids, no_special_marker=plain)
        items = [prompts.build(example) for example in examples]
        longest = max(len(item["input_ids"]) for item in items)
        if self.positions and longest > self.positions:
            raise UserError(f"the question: {longest} tokens with thoughts, the model takes {self.positions}")
        return items


def open_checkpoint(path: str, thoughts: int | None = None) -> Opened:
    """Loads a checkpoint. Its prompts hold `thoughts` thoughts or pauses (None: as many as it was trained with)."""
    description = read_description(path)
    if not description:
        remedy = "give a checkpoint of a run, such as checkpoints/NAME/best"
        raise UserError(f"{path} holds no {DESCRIPTION}, so it is no checkpoint of ours; {remedy}")
    # A question does not tell its number of steps, so pad_latent_to_max keeps its default, True.
    values = {key: description[key] for key in ("method", "c_thought", "max_latent_stage")}
    config = Config(values | {"max_new_tokens": description.get("max_new_tokens")})
    pretrained = load_pretrained(config, path)
    model = pretrained.coconut().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    opened = Opened(path, pretrained, model, config, description["stage"])
    return opened if thoughts is None else opened.with_thoughts(thoughts)
