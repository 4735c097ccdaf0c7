"""The sequences of a stage, their order and lengths, and the batches and optimizer steps made of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyarrow import compute

from coconut import plan_batch
from components.data_sources import locate_problem
from components.distributed import Processes
from components.prefetch import prefetch
from components.pretrained import Pretrained
from components.tokenization import TOKENS, check_tokens, default_cache, load_tokenized
from config import Config, UserError
from curriculum import (
    apply_curriculum,
    method_of,
    needs_steps,
    num_placeholders,
    num_removed,
    scheduled_stages,
    stage_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 1000  # items in memory at a time where all of a data set are read
GROUPED_STEPS = 16  # optimizer steps whose problems group_by_length sorts together
DEBUG_TRAIN, DEBUG_VALID = 5000, 32  # problems in a debug run


def get_dataset(path: str | list[str], tokenizer, max_size: int | None = None) -> Dataset:
    """Load the first max_size problems of a source as token ids; see `read_problems` and `tokenize_chunk`."""
    [examples] = load_tokenized([(path, max_size, True)], tokenizer, default_cache(), Processes())
    return examples.select_columns(TOKENS)


def load_data(config: Config, pretrained: Pretrained, processes: Processes) -> tuple[Dataset | None, Dataset]:
    """Load the tokenized training problems (None for only_eval) and the validation problems, with their texts.

    Raises UserError for a problem whose sequences are longer than the model's positions, and for tokens that it lacks.
    """
    train_size, valid_size = None, None if config.only_eval else config.eval_max_problems
    if config.debug:
        train_size, valid_size = DEBUG_TRAIN, DEBUG_VALID
    steps = needs_steps(config)
    sources = [] if config.only_eval else [(config.train_path, train_size, steps, config.columns)]
    sources.append((config.val_path, valid_size, steps, config.columns))
    folder = None if config.debug else config.data_cache or default_cache()
    data = load_tokenized(sources, pretrained.tokenizer, folder, processes)
    processes.run_on_rank0(lambda: check_data(data, [path for path, *_ in sources], config, pretrained))
    *train, valid = data
    return (train[0].select_columns(TOKENS) if train else None), valid


def check_data(data: list[Dataset], paths: list, config: Config, pretrained: Pretrained) -> None:
    """Check data against the model, and validation against training data; warn, or raise UserError."""
    lm, stages = pretrained.lm, scheduled_stages(config, pretrained.description)
    for examples, path in zip(data, paths, strict=True):
        rows = len(lm.get_input_embeddings().weight)
        check_tokens(examples, pretrained.tokenizer, rows, pretrained.source, path)
        if limit := getattr(lm.config, "max_position_embeddings", None):
            check_lengths(examples, stages, config, limit, path, mix_stages=examples is not data[-1])
    if config.only_eval:
        return
    train, valid = (examples.with_format("arrow")[:] for examples in data)
    if common := compute.sum(compute.is_in(valid["question"], value_set=train["question"])).as_py():
        print(f"warning: {common} of {len(valid)} questions of val_path are in train_path too", flush=True)
    most, last = list_lengths(train["steps"]).max(), min(max(stages), config.max_latent_stage)
    if method_of(config).steps == "by stage" and last > most:
        which = f"stage {last} removes" if last == most + 1 else f"stages {most + 1} to {last} remove"
        remedy = f"set max_latent_stage: {most}, or check the data" if most else "check the data"
        print(f"warning: no problem of train_path has more than {most} steps, so {which} nothing; {remedy}", flush=True)


class SequenceDataset(torch.utils.data.Dataset):
    """Examples turned into model inputs on access, in a given order; `build(example)` makes one item."""

    def __init__(self, examples: Dataset, build: Callable[[dict], dict], order: list[int] | None = None):
        self.examples, self.build, self.order = examples, build, order

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Return several items; their examples are read at once, so a batch costs little more than one item."""
        rows = indices if self.order is None else [self.order[index] for index in indices]
        return [self.build(example) for example in self.examples.__getitems__(rows)]

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers of tokens of some items."""
        chunks = (indices[start : start + ROWS] for start in range(0, len(indices), ROWS))
        return [len(item["input_ids"]) for chunk in chunks for item in self.__getitems__(chunk)]


def get_question_latent_dataset(
    scheduled_stage: int,
    base_dataset: Dataset,
    configs,
    start_id: int,
    latent_id: int,
    end_id: int,
    no_special_marker=False,
) -> SequenceDataset:
    """Make prompts for generation at a stage: question, start marker, thoughts, end marker; no steps, no labels."""
    method_of(configs)  # raises for a config without one, before any item is made

    def build(example: dict) -> dict:
        """Make the prompt of one example as a feature for the collator."""
        count, _ = apply_curriculum(scheduled_stage, example["steps_tokenized"], configs, training=False)
        middle = [latent_id] * count if no_special_marker else [start_id, *[latent_id] * count, end_id]
        return make_feature(example["question_tokenized"] + middle, example["idx"])

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
    """Make training sequences at a stage: the prompt as above, then the remaining steps and the answer, with labels.

    Labels are -100 up to and including the end marker. With `shuffle`, the order is `epoch_order`. An example's stage
    and offset, from `draw`, depend on configs.seed and epoch only; mix_stages=False, for validation, draws none.
    """
    method_of(configs)  # raises for a config without one, before any item is made

    def build(example: dict) -> dict:
        """Make the sequence of one example, with labels, as a feature for the collator."""
        stage, offset = draw(example, scheduled_stage, epoch, configs) if mix_stages else (scheduled_stage, 0)
        count, rest = apply_curriculum(stage, example["steps_tokenized"], configs, training=True, offset=offset)
        middle = [latent_id] * count if no_special_marker else [start_id, *[latent_id] * count, end_id]
        prompt, target = example["question_tokenized"] + middle, rest + example["answer_tokenized"]
        return {**make_feature(prompt + target, example["idx"]), "labels": [-100] * len(prompt) + target}

    order = epoch_order(base_dataset, configs, epoch, step_size) if shuffle else None
    return SequenceDataset(base_dataset, build, order)


def epoch_order(examples: Dataset, configs, epoch: int, step_size: int) -> list[int]:
    """Return the order of an epoch's examples: a permutation that depends on configs.seed and epoch only.

    configs.group_by_length sorts the problems of every GROUPED_STEPS optimizer steps by their length at the epoch's
    first stage, divides them into steps of step_size (on which the order then depends too), and shuffles the steps. An
    incomplete step stays last, so it holds the longest problems of its group.
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
    """Draw an example's stage and offset in an epoch, a function of (seed, epoch, idx) only.

    With probability uniform_prob the stage is uniform over 0 .. number of steps instead of the scheduled one. The
    offset is icot's removal smoothing: o further tokens are removed with probability proportional to exp(-lambda o).
    """
    steps = method_of(configs).steps
    random_ = random.Random(f"{configs.seed} {epoch} {example['idx']}")
    if steps == "by stage" and configs.uniform_prob and random_.random() < configs.uniform_prob:
        stage = random_.randint(0, len(example["steps_tokenized"]))
    smooth = steps == "by token" and configs.removal_smoothing_lambda
    return stage, int(random_.expovariate(configs.removal_smoothing_lambda)) if smooth else 0


def make_feature(input_ids: list[int], idx: int) -> dict:
    """Make a feature for the collator from one unpadded sequence."""
    n = len(input_ids)
    return {"input_ids": input_ids, "attention_mask": [1] * n, "position_ids": list(range(n)), "idx": idx}


class MyCollator:
    """Pad features into a batch whose first latents are in one column.

    Rows with latents are padded on the left, then all rows on the right (x token, L latent, - padding):

        xxxxxxxxxxLLxxxxx--
        -----xxxxxLLLLxxx--
        ---xxxxxxxLLxxxxxxx

    Returns a dict of int64 tensors (batch, length): input_ids (pad id), attention_mask (0), position_ids (0 at pads,
    counted from each row's first token) and, if the features have them, labels (label_pad_token_id); idx is (batch,).
    The features are not modified.
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
        """Return the position of a row's first latent, None if it has none."""
        return input_ids.index(self.latent_id) if self.latent_id in input_ids else None


class PlanningCollator(MyCollator):
    """MyCollator whose batches hold their `plan_batch` too, so that prefetch workers make it."""

    def __call__(self, features: list[dict]) -> dict:
        batch = super().__call__(features)
        plan = plan_batch(batch["input_ids"], batch["attention_mask"], batch.get("labels"), self.latent_id)
        return batch | {"plan": plan}


def model_args(batch: dict) -> dict:
    """Return the part of a batch that the model takes."""
    return {key: value for key, value in batch.items() if key != "idx"}


def to_device(batch: dict, device: torch.device) -> dict:
    """Return a batch with its tensors on a device; the copy is asynchronous. Its plan stays: the model moves it.

    Before FSDP sees them: it would move what it is given itself, and wait for a GPU with every tensor.
    """
    move = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return batch | {key: tensor.to(device, non_blocking=True) for key, tensor in move.items()}


def prefetch_batches(make: Callable, items: Sequence, config: Config, processes: Processes) -> Iterator:
    """Yield make(item) for every item, prefetched by config.data_workers processes and pinned for a GPU.

    By default a single GPU has one. Several have none: NCCL is not fork-safe, and a batch takes milliseconds to make,
    while the GPUs compute.
    """
    on_gpu, workers = processes.device.type == "cuda", config.data_workers
    if workers is None:
        workers = int(on_gpu and processes.world_size == 1)
    return prefetch(make, items, workers, pin=on_gpu)


class Lengths:
    """The numbers of tokens in all parts of all examples, read from the offsets of an Arrow table at once."""

    def __init__(self, examples: Dataset):
        table = examples.with_format("arrow")[:]
        # (n,) each
        self.question, self.answer = (list_lengths(table[f"{part}_tokenized"]) for part in ("question", "answer"))
        self.num_steps = list_lengths(table["steps_tokenized"])  # (n,)
        self.step_lengths = list_lengths(compute.list_flatten(table["steps_tokenized"]))  # (all steps,)
        self.example_index = np.repeat(np.arange(len(self.num_steps)), self.num_steps)  # (all steps,)
        first = np.repeat(np.cumsum(self.num_steps) - self.num_steps, self.num_steps)  # (all steps,)
        self.step_index = np.arange(len(self.step_lengths)) - first  # (all steps,), from 0 in each example

    def of_sequences(self, stage: int, configs) -> np.ndarray:
        """Return the length of each training sequence at a stage. (n,)"""
        counts = [num_placeholders(stage, n, configs, training=True) for n in range(self.num_steps.max(initial=0) + 1)]
        prompt = self.question + (2 if method_of(configs).markers else 0) + np.array(counts)[self.num_steps]  # (n,)
        return prompt + self.of_targets(stage, configs)

    def of_targets(self, stage: int, configs) -> np.ndarray:
        """Return the length of the supervised part of each training sequence at a stage. (n,)"""
        removed = num_removed(stage, configs, training=True)
        if method_of(configs).steps == "by token":
            return np.maximum(self.sum_by_example(self.step_lengths) - removed, 0) + self.answer
        return self.sum_by_example(self.step_lengths * (self.step_index >= removed)) + self.answer

    def sum_by_example(self, numbers: np.ndarray) -> np.ndarray:
        """Sum numbers of steps by example. (all steps,) -> (n,)"""
        return np.bincount(self.example_index, numbers, minlength=len(self.num_steps)).astype(np.int64)  # exact


def list_lengths(lists) -> np.ndarray:
    """Return the lengths of the lists in an Arrow column."""
    return compute.list_value_length(lists).to_numpy().astype(np.int64)


def check_lengths(
    examples: Dataset, stages: set[int], configs, limit: int, path: str | list[str], mix_stages: bool = True
) -> None:
    """Raise UserError for the first problem with a sequence longer than the model's `limit` positions at a stage.

    With mix_stages (training), the stages that configs.uniform_prob may draw count too.
    """
    lengths, found = Lengths(examples), []
    drawn = range(lengths.num_steps.max(initial=0) + 1) if mix_stages and configs.uniform_prob else ()
    for stage in {*stages, *drawn}:
        tokens = lengths.of_sequences(stage, configs)
        too_long = tokens > limit
        if stage not in stages:
            too_long &= lengths.num_steps >= stage  # others never draw it
        if too_long.any():
            index = int(too_long.argmax())
            found.append((index, stage, tokens[index]))
    if found:
        index, stage, length = min(found)
        raise UserError(
            f"{locate_problem(path, index, configs.columns)} makes a sequence of {length} tokens at stage {stage}, but "
            f"the model has {limit} positions; shorten or remove it, or choose a model with more positions"
        )


def step_batches(
    examples: Sequence[int], per_pass: int, passes: int, rank: int, world_size: int
) -> list[tuple[int, list[list[int]]]]:
    """Divide examples into optimizer steps, and this rank's share of each step into micro-batches.

    A step takes the next per_pass * passes * world_size examples, whoever computes them, so the steps are the same for
    any division. Every rank gets equally many micro-batches; one is empty where too few examples are left.
    Returns for each step its number of examples, and the examples of each of this rank's micro-batches.
    """
    size = per_pass * passes * world_size
    steps = []
    for start in range(0, len(examples), size):
        step = examples[start : start + size]
        mine, needed = step[rank::world_size], math.ceil(len(step) / (per_pass * world_size))
        steps.append((len(step), [list(mine[i::needed]) for i in range(needed)]))
    return steps
