"""From tokenized problems to the sequences of a stage, their order, their lengths, and batches of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyarrow import compute

from components.distributed import Processes
from components.tokenization import TOKENS, default_cache, load_tokenized
from config import UserError
from curriculum import METHODS, apply_curriculum, num_removed, placeholders, stage_of

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 1000  # items in memory where all of a data set are looked at
GROUPED_STEPS = 16  # optimizer steps whose problems group_by_length sorts together


def get_dataset(path: str, tokenizer, max_size: int | None = None) -> Dataset:
    """The first max_size problems of a source as token ids; see `read_problems`, `load_tokenized`, `tokenize_chunk`."""
    [examples] = load_tokenized([(path, max_size)], tokenizer, default_cache(), Processes())
    return examples.select_columns(TOKENS)


class SequenceDataset(torch.utils.data.Dataset):
    """Examples turned into model inputs on access, in a given order: `build(example)` makes one item."""

    def __init__(self, examples: Dataset, build: Callable[[dict], dict], order: list[int] | None = None):
        self.examples, self.build, self.order = examples, build, order

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Several items, whose examples are read at once: a batch costs little more than a single one."""
        places = indices if self.order is None else [self.order[index] for index in indices]
        return [self.build(example) for example in self.examples.__getitems__(places)]

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """The numbers of tokens of some items."""
        parts = (indices[start : start + ROWS] for start in range(0, len(indices), ROWS))
        return [len(item["input_ids"]) for part in parts for item in self.__getitems__(part)]


def get_question_latent_dataset(
    scheduled_stage: int,
    base_dataset: Dataset,
    configs,
    start_id: int,
    latent_id: int,
    end_id: int,
    no_special_marker=False,
) -> SequenceDataset:
    """Prompts for generation at a stage: question, start marker, thoughts, end marker; no steps, no labels."""

    def build(example: dict) -> dict:
        """The prompt of one example."""
        count, _ = apply_curriculum(scheduled_stage, example["steps_tokenized"], configs, training=False)
        middle = [latent_id] * count if no_special_marker else [start_id, *[latent_id] * count, end_id]
        return model_inputs(example["question_tokenized"] + middle, example["idx"])

    return SequenceDataset(base_dataset, build)


def get_cot_latent_dataset(
    scheduled_stage: int,
    base_dataset: Dataset,
    configs,
    start_id: int,
    latent_id: int,
    end_id: int,
    no_special_marker=False,
    shuffle=False,
    epoch: int = 0,
    mix_stages: bool = True,
    step_size: int = 1,
) -> SequenceDataset:
    """Training sequences at a stage: the prompt as above, then the steps that are left and the answer, with labels.

    The labels are -100 up to and including the end marker. With `shuffle` the order is that of `epoch_order`. The stage
    and the offset that `draw` makes for an example depend on configs.seed and epoch alone (mix_stages=False: none is
    made, as in validation).
    """

    def build(example: dict) -> dict:
        """The sequence of one example, with labels."""
        stage, offset = draw(example, scheduled_stage, epoch, configs) if mix_stages else (scheduled_stage, 0)
        count, rest = apply_curriculum(stage, example["steps_tokenized"], configs, training=True, offset=offset)
        middle = [latent_id] * count if no_special_marker else [start_id, *[latent_id] * count, end_id]
        prompt, target = example["question_tokenized"] + middle, rest + example["answer_tokenized"]
        inputs = model_inputs(prompt + target, example["idx"])
        return {**inputs, "labels": [-100] * len(prompt) + target}

    order = epoch_order(base_dataset, configs, epoch, step_size) if shuffle else None
    return SequenceDataset(base_dataset, build, order)


def epoch_order(examples: Dataset, configs, epoch: int, step_size: int) -> list[int]:
    """The order of an epoch's examples: a permutation that depends on configs.seed and epoch alone.

    configs.group_by_length sorts the problems of every few optimizer steps (of step_size examples, on which the order
    then depends, too) by their length at the epoch's first stage before they are dealt out to these steps, and shuffles
    the steps. An incomplete step stays the epoch's last, so it holds the longest problems of the last few steps.
    """
    order, rng = list(range(len(examples))), random.Random(f"order {configs.seed} {epoch}")
    rng.shuffle(order)
    if not configs.group_by_length:
        return order
    lengths = Lengths(examples).of_sequences(stage_of(epoch, configs), configs).tolist()
    grouped, size = [], GROUPED_STEPS * step_size
    for start in range(0, len(order), size):
        window = sorted(order[start : start + size], key=lengths.__getitem__)
        steps = [window[i : i + step_size] for i in range(0, len(window), step_size)]
        full = len(window) // step_size
        complete, incomplete = steps[:full], steps[full:]
        rng.shuffle(complete)
        grouped += chain(*complete, *incomplete)
    return grouped


def draw(example: dict, stage: int, epoch: int, configs) -> tuple[int, int]:
    """An example's stage and offset in an epoch: functions of (seed, epoch, idx) only.

    With probability uniform_prob the stage is one of 0 .. number of steps instead of the scheduled one. The offset is
    icot's removal smoothing: o further tokens are dropped with probability proportional to exp(-lambda o).
    """
    steps = METHODS[configs.method].steps
    random_ = random.Random(f"{configs.seed} {epoch} {example['idx']}")
    if steps == "by stage" and configs.uniform_prob and random_.random() < configs.uniform_prob:
        stage = random_.randint(0, len(example["steps_tokenized"]))
    smooth = steps == "by token" and configs.removal_smoothing_lambda
    return stage, int(random_.expovariate(configs.removal_smoothing_lambda)) if smooth else 0


def model_inputs(input_ids: list[int], idx: int) -> dict:
    """One unpadded sequence as a feature for the collator."""
    n = len(input_ids)
    return {"input_ids": input_ids, "attention_mask": [1] * n, "position_ids": list(range(n)), "idx": idx}


class MyCollator:
    """Pads features into a batch so that the first latents stand in one column.

    Rows with latents are padded on the left, then all rows on the right (x token, L latent, - padding):

        xxxxxxxxxxLLxxxxx--
        -----xxxxxLLLLxxx--
        ---xxxxxxxLLxxxxxxx

    Returns a dict of int64 tensors (batch, length): input_ids (pad id), attention_mask (0), position_ids (0 at pads,
    counted from each row's first token) and, where the features have them, labels (label_pad_token_id); idx is
    (batch,). The features are left as they are.
    """

    def __init__(self, tokenizer, latent_id: int | None = None, label_pad_token_id: int = -100):
        self.latent_id = latent_id
        self.padding = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "position_ids": 0,
            "labels": label_pad_token_id,
        }

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        firsts = [self.first_latent(feature["input_ids"]) for feature in features]
        column = max((first for first in firsts if first is not None), default=0)
        left = [0 if first is None else column - first for first in firsts]
        length = max(n + len(feature["input_ids"]) for n, feature in zip(left, features, strict=True))
        batch = {}
        for key, pad in self.padding.items():
            if key in features[0]:
                rows = np.full((len(features), length), pad, dtype=np.int64)  # numpy reads lists faster than torch
                for row, n, feature in zip(rows, left, features, strict=True):
                    row[n : n + len(feature[key])] = feature[key]
                batch[key] = torch.from_numpy(rows)  # (batch, length)
        if "idx" in features[0]:
            batch["idx"] = torch.tensor([feature["idx"] for feature in features])  # (batch,)
        return batch

    def first_latent(self, input_ids: list[int]) -> int | None:
        """The position of a row's first latent, None in a row without any."""
        return input_ids.index(self.latent_id) if self.latent_id in input_ids else None


class Lengths:
    """The numbers of tokens in all parts of all examples, read off the offsets in an Arrow table at once."""

    def __init__(self, examples: Dataset):
        table = examples.with_format("arrow")[:]
        self.question, self.answer = (lengths(table[f"{part}_tokenized"]) for part in ("question", "answer"))  # (n,)
        self.steps = lengths(table["steps_tokenized"])  # (n,), the number of steps
        self.step = lengths(compute.list_flatten(table["steps_tokenized"]))  # (all steps,)
        self.example = np.repeat(np.arange(len(self.steps)), self.steps)  # (all steps,), whose step it is
        self.place = np.arange(len(self.step)) - np.repeat(np.cumsum(self.steps) - self.steps, self.steps)  # from 0

    def of_sequences(self, stage: int, configs) -> np.ndarray:
        """The length of each training sequence at a stage. (n,)"""
        markers = 2 if METHODS[configs.method].markers else 0
        return self.question + markers + self.placeholders(stage, configs) + self.supervised(stage, configs)

    def placeholders(self, stage: int, configs) -> np.ndarray:
        """The number of placeholders in each training sequence at a stage. (n,)"""
        counts = [placeholders(stage, steps, configs, training=True) for steps in range(self.steps.max(initial=0) + 1)]
        return np.array(counts)[self.steps]

    def supervised(self, stage: int, configs) -> np.ndarray:
        """The number of supervised tokens in each training sequence at a stage: steps that are left and answer. (n,)"""
        skipped = num_removed(stage, configs, training=True)
        if METHODS[configs.method].steps == "by token":
            return np.maximum(self.sum_by_example(self.step) - skipped, 0) + self.answer
        return self.sum_by_example(self.step * (self.place >= skipped)) + self.answer

    def most(self, stage: int, configs) -> dict[str, int]:
        """The most columns of a padded batch at a stage, and thoughts and supervised tokens of a training sequence."""
        sequences, supervised = self.of_sequences(stage, configs), self.supervised(stage, configs)  # (n,) each
        counts = self.placeholders(stage, configs) * (METHODS[configs.method].placeholder == "latent")  # (n,)
        before = self.question + 1  # (n,), tokens that stand before the first thought
        latent = counts > 0  # rows whose first thoughts the collator puts into one column
        apart = before[latent].max(initial=0) + (sequences - before)[latent].max(initial=0)
        most = {"columns": max(sequences.max(), apart), "supervised": supervised.max(), "thoughts": counts.max()}
        return {name: int(count) for name, count in most.items()}

    def sum_by_example(self, numbers: np.ndarray) -> np.ndarray:
        """Sums of a number for each step. (all steps,) -> (n,)"""
        return np.bincount(self.example, numbers, minlength=len(self.steps)).astype(np.int64)  # exact: sums of tokens


def lengths(lists) -> np.ndarray:
    """The lengths of the lists in an Arrow column."""
    return compute.list_value_length(lists).to_numpy().astype(np.int64)


def check_lengths(examples: Dataset, stages: set[int], configs, limit: int, path: str, mix_stages: bool = True) -> None:
    """Raises UserError for the first problem with a sequence longer than the model's `limit` positions at a stage.

    With mix_stages (training) the stages that configs.uniform_prob may draw count, too.
    """
    parts, found = Lengths(examples), []
    drawn = range(parts.steps.max(initial=0) + 1) if mix_stages and configs.uniform_prob else ()
    for stage in {*stages, *drawn}:
        tokens = parts.of_sequences(stage, configs)
        too_long = tokens > limit
        if stage not in stages:
            too_long &= parts.steps >= stage  # others do not draw it
        if too_long.any():
            index = int(too_long.argmax())
            found.append((index, stage, tokens[index]))
    if found:
        index, stage, length = min(found)
        raise UserError(
            f"{path}: problem {index} makes a sequence of {length} tokens at stage {stage}, but the "
            f"model has {limit} positions; shorten or drop it, or choose a model with more positions"
        )


def step_batches(
    examples: Sequence[int], per_pass: int, passes: int, rank: int, world_size: int
) -> list[tuple[int, list[list[int]]]]:
    """Splits examples into optimizer steps, and this rank's share of each step into forward passes.

    A step takes the next per_pass * passes * world_size examples, whoever computes them, so the steps are the same for
    any division of labour. Every rank makes equally many passes; a pass is empty where too few examples are left.
    Returns for each step the number of its examples, and the examples of each of this rank's passes.
    """
    size = per_pass * passes * world_size
    steps = []
    for start in range(0, len(examples), size):
        step = examples[start : start + size]
        mine, needed = step[rank::world_size], math.ceil(len(step) / (per_pass * world_size))
        steps.append((len(step), [list(mine[i::needed]) for i in range(needed)]))
    return steps
