"""From problems to token sequences: reading, tokenizing, the stage curriculum and the collator."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from config import UserError
from curriculum import END, LATENT, METHODS, PAUSE, START, placeholders_and_rest, stage_of

GROUPED_STEPS = 16  # optimizer steps whose problems group_by_length sorts together
TOKENIZE_CHUNK = 10_000  # problems tokenized in one call: bounds the memory of the call
SHAPE = '{"question": "...", "answer": "...", "steps": ["...", ...]}'


def read_problems(path: str, max_size: int | None = None) -> list[dict]:
    """The first max_size problems of a JSON file: dicts with question (str), answer (str) and steps (list of str).

    Raises UserError that names the file, the problem's index (from 0) and the field.
    """
    try:
        problems = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the data: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}; expected a list of {SHAPE}") from error
    if not isinstance(problems, list) or not problems:
        what = "an empty list" if problems == [] else type(problems).__name__
        raise UserError(f"{path}: expected a list of problems {SHAPE}, found {what}")
    problems = problems[:max_size]
    for index, problem in enumerate(problems):
        if complaint := problem_complaint(problem):
            raise UserError(f"{path}: problem {index}: {complaint}; expected {SHAPE}")
    return problems


def problem_complaint(problem) -> str | None:
    """What is wrong with one problem of a data file, or None."""
    if not isinstance(problem, dict):
        return f"is no object but {type(problem).__name__}"
    for name in ("question", "answer", "steps"):
        if name not in problem:
            return f'has no "{name}"'
    if not isinstance(problem["steps"], list):
        return f'"steps" is no list but {problem["steps"]!r:.60}'
    texts = {"question": problem["question"], "answer": problem["answer"]}
    texts |= {f"steps[{i}]": step for i, step in enumerate(problem["steps"])}
    for name, text in texts.items():
        if not isinstance(text, str):
            return f'"{name}" is no string but {text!r:.60}'
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            return f'"{name}" holds half a surrogate pair, which is no character'
        if "<|" in text and (marker := next((m for m in (START, END, LATENT, PAUSE) if m in text), None)):
            return f'"{name}" holds {marker}, which only the curriculum may insert'
    return None if problem["question"].strip() else '"question" is empty'


def tokenize_problems(problems: list[dict], tokenizer) -> list[dict]:
    """Token ids of every problem: question_tokenized, steps_tokenized (a list for each step), answer_tokenized, idx.

    The question takes the tokenizer's special tokens (bos, if it adds one); steps and answer do not. Each piece ends
    its line; the answer follows "### " and ends with eos.
    """

    def encode(texts: list[str], special: bool = False) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []

    examples = []
    for start in range(0, len(problems), TOKENIZE_CHUNK):
        chunk = problems[start : start + TOKENIZE_CHUNK]
        questions = encode([problem["question"] + "\n" for problem in chunk], special=True)
        answers = encode(["### " + problem["answer"] for problem in chunk])
        steps = iter(encode([step + "\n" for problem in chunk for step in problem["steps"]]))
        for problem, question, answer in zip(chunk, questions, answers, strict=True):
            examples.append(
                {
                    "question_tokenized": question,
                    "steps_tokenized": [next(steps) for _ in problem["steps"]],
                    "answer_tokenized": [*answer, tokenizer.eos_token_id],
                    "idx": len(examples),
                }
            )
    return examples


def get_dataset(path: str, tokenizer, max_size: int | None = None) -> list[dict]:
    """Reads and tokenizes a data file; see `read_problems` and `tokenize_problems`."""
    return tokenize_problems(read_problems(path, max_size), tokenizer)


class SequenceDataset(torch.utils.data.Dataset):
    """Examples turned into model inputs on access, in a given order: `build(example)` makes one item."""

    def __init__(self, examples: Sequence[dict], build: Callable[[dict], dict], order: list[int] | None = None):
        self.examples, self.build, self.order = examples, build, order

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.build(self.examples[index if self.order is None else self.order[index]])


def get_question_latent_dataset(
    scheduled_stage: int,
    base_dataset,
    configs,
    start_id: int,
    latent_id: int,
    end_id: int,
    no_special_marker=False,
) -> SequenceDataset:
    """Prompts for generation at a stage: question, start marker, thoughts, end marker; no steps, no labels."""

    def build(example: dict) -> dict:
        """The prompt of one example."""
        count, _ = placeholders_and_rest(scheduled_stage, example["steps_tokenized"], configs, training=False)
        middle = [latent_id] * count if no_special_marker else [start_id, *[latent_id] * count, end_id]
        return model_inputs(example["question_tokenized"] + middle, example["idx"])

    return SequenceDataset(base_dataset, build)


def get_cot_latent_dataset(
    scheduled_stage: int,
    base_dataset,
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
        count, rest = placeholders_and_rest(stage, example["steps_tokenized"], configs, training=True, offset=offset)
        middle = [latent_id] * count if no_special_marker else [start_id, *[latent_id] * count, end_id]
        prompt, target = example["question_tokenized"] + middle, rest + example["answer_tokenized"]
        inputs = model_inputs(prompt + target, example["idx"])
        return {**inputs, "labels": [-100] * len(prompt) + target}

    order = epoch_order(base_dataset, configs, epoch, step_size) if shuffle else None
    return SequenceDataset(base_dataset, build, order)


def epoch_order(examples: Sequence[dict], configs, epoch: int, step_size: int) -> list[int]:
    """The order of an epoch's examples: a permutation that depends on configs.seed and epoch alone.

    configs.group_by_length sorts the problems of every few optimizer steps (of step_size examples, on which the order
    then depends, too) by their length before they are dealt out to these steps, and shuffles the steps. An incomplete
    step stays the epoch's last, so it holds the longest problems of the last few steps.
    """
    order, rng = list(range(len(examples))), random.Random(f"order {configs.seed} {epoch}")
    rng.shuffle(order)
    if not configs.group_by_length:
        return order
    stage = stage_of(epoch, configs)

    def length(index: int) -> int:
        """The tokens of a problem at the epoch's first stage, without markers."""
        example = examples[index]
        count, rest = placeholders_and_rest(stage, example["steps_tokenized"], configs, training=True)
        return len(example["question_tokenized"]) + count + len(rest) + len(example["answer_tokenized"])

    grouped, size = [], GROUPED_STEPS * step_size
    for start in range(0, len(order), size):
        window = sorted(order[start : start + size], key=length)
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


def check_lengths(
    examples: list[dict], stages: set[int], configs, limit: int, path: str, mix_stages: bool = True
) -> None:
    """Raises UserError for the first problem with a sequence longer than the model's `limit` positions at a stage.

    With mix_stages (training) the stages that configs.uniform_prob may draw count, too.
    """
    markers = 2 if METHODS[configs.method].markers else 0
    for example in examples:
        steps = example["steps_tokenized"]
        kept = len(example["question_tokenized"]) + len(example["answer_tokenized"]) + markers
        drawn = range(len(steps) + 1) if mix_stages and configs.uniform_prob else ()
        for stage in sorted({*stages, *drawn}):
            count, rest = placeholders_and_rest(stage, steps, configs, training=True)
            length = kept + count + len(rest)
            if length > limit:
                raise UserError(
                    f"{path}: problem {example['idx']} makes a sequence of {length} tokens at stage {stage}, but the "
                    f"model has {limit} positions; shorten or drop it, or choose a model with more positions"
                )


def step_batches(
    examples: range, per_pass: int, passes: int, rank: int, world_size: int
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
