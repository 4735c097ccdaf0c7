"""Validation: loss, generation, answer extraction, accuracy; only_eval; checkpoints opened for questions."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor

from coconut import Coconut, check_model
from components.data_sources import content_digest, data_name, problem_error
from components.display import progress_bar
from components.distributed import Processes
from components.errors import VALIDATION_MEMORY_ADVICE
from components.export import require_description
from components.files import make_private, saving, write_atomic
from components.parallelize import unsharded
from components.pretrained import Pretrained, load_pretrained
from components.run_directory import locate
from components.tokenization import ANSWER_PREFIX, TEXTS, TOKENS, tokenize_chunk
from config import Config, UserError
from curriculum import ALL_STEPS, METHODS, apply_curriculum, evaluation_stage, num_placeholders, scheduled_stages
from dataset import (
    Lengths,
    PlanningCollator,
    SequenceDataset,
    get_cot_latent_dataset,
    get_question_latent_dataset,
    model_args,
    prefetch_batches,
    to_device,
)
from utils import StopRequest

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Evaluation:
    """The result of one validation; rates are fractions of all problems.

    loss: mean cross entropy over all supervised tokens; cot_match: None for methods that do not write steps, and for
    data without steps; new_tokens: mean number of generated tokens (eos and thoughts included, as in the paper's Table
    1); seconds: mean generation time per problem; predictions: one dict per problem, in the data's order.
    """

    loss: float
    accuracy: float
    cot_match: float | None
    new_tokens: float
    seconds: float
    predictions: list[dict]

    def metrics(self) -> dict[str, float]:
        """Return the numbers under their names in metrics.jsonl."""
        values = {"loss": self.loss, "acc": self.accuracy, "new_tokens": self.new_tokens, "seconds": self.seconds}
        if self.cot_match is not None:
            values["cot_em"] = self.cot_match
        return {f"eval/{name}": value for name, value in values.items()}

    def summary(self) -> str:
        """Return the result as text."""
        cot = "" if self.cot_match is None else f", CoT match {self.cot_match:.1%}"
        return (
            f"validation: accuracy {self.accuracy:.1%}{cot}, loss {self.loss:.4f}, "
            f"{self.new_tokens:.1f} tokens and {self.seconds:.4f} s per problem"
        )

    def samples(self, count: int) -> str:
        """Return the first few predictions as text."""
        lines = []
        for p in self.predictions[:count]:
            lines.append(f"  [{'right' if p['correct'] else 'wrong'}] ...{p['question'][-60:]}")
            lines.append(f"    expected {p['expected']!r}, generated {p['generated']!r}")
        return "\n".join(lines)


class Validator:
    """Measures a model on the validation problems; every problem counts once, on any number of ranks.

    Args:
        model: the Coconut module, on this rank's device or sharded.
        pretrained: its language model's tokenizer and special tokens.
        data: the validation problems, texts and tokens.
        stop: checked after every batch.
    """

    def __init__(
        self,
        model: Coconut,
        pretrained: Pretrained,
        data: Dataset,
        config: Config,
        processes: Processes,
        stop: StopRequest,
    ):
        self.model, self.pretrained, self.config, self.processes, self.stop = model, pretrained, config, processes, stop
        self.problems, self.examples = data.select_columns(TEXTS), data.select_columns(TOKENS)
        self.has_steps = any(self.problems["steps"])
        self.sequence_tokens = pretrained.sequence_tokens(config.method)
        self.collate = PlanningCollator(pretrained.tokenizer, model.latent_token_id)

    def check_references(self) -> None:
        """Check that the outputs that training asks for can be generated and count as right.

        Warns of problems that are wrong by construction. Raises UserError if all answers are.
        """
        config, tokenizer, limit = self.config, self.pretrained.tokenizer, self.config.answer_limit
        stages = scheduled_stages(config, self.pretrained.description)
        last, lengths, total = max(stages), Lengths(self.examples), len(self.problems)
        longest = max((lengths.of_targets(stage, config) - 1 for stage in stages), key=lambda n: (n > limit).sum())
        if too_long := (longest > limit).sum():
            print(
                f"warning: max_new_tokens: the outputs of {too_long} of {total} problems of val_path are longer than "
                f"{limit} tokens, so they cannot be right; set max_new_tokens: {longest.max()}",
                flush=True,
            )
        wrong = []
        for problem, example in zip(self.problems, self.examples, strict=True):
            _, written = apply_curriculum(last, example["steps_tokenized"], config, training=True)
            prediction = score(problem, example, written + example["answer_tokenized"], 0, tokenizer, config)
            if not prediction["correct"]:
                wrong.append(prediction)
        if wrong:
            text = (
                f"val_path: {config.val_path}: {len(wrong)} of {total} answers can never be right, since the tokenizer "
                f"does not return them: problem {wrong[0]['idx']} becomes {wrong[0]['generated'][-60:]!r}; it must "
                f"know {ANSWER_PREFIX!r}, and steps must not contain {tokenizer.eos_token!r}"
            )
            if len(wrong) == total:
                raise UserError(text)
            print(f"warning: {text}", flush=True)

    def validate(self, stage: int) -> Evaluation:
        """Validate at a stage and print config.samples predictions; all ranks return the same.

        Raises Interrupted on all ranks after a signal to any of them.
        """
        self.model.eval()
        try:
            with torch.no_grad(), unsharded(self.model):
                loss = self.mean_loss(stage)
                started = time.perf_counter()
                predictions = self.predict_all(stage)
                [seconds] = self.processes.all_reduce_max([time.perf_counter() - started])
        except torch.OutOfMemoryError as error:
            error.add_note(VALIDATION_MEMORY_ADVICE)
            raise
        evaluation = Evaluation(
            loss=loss,
            accuracy=mean(predictions, "correct"),
            cot_match=mean(predictions, "cot_match") if self.has_steps and "cot_match" in predictions[0] else None,
            new_tokens=mean(predictions, "new_tokens"),
            seconds=seconds / len(predictions),
            predictions=predictions,
        )
        if self.config.samples:
            self.processes.print(evaluation.samples(self.config.samples))
        return evaluation

    def mean_loss(self, stage: int) -> float:
        """Return the mean cross entropy over all supervised tokens of all problems at a stage."""
        sequences = get_cot_latent_dataset(stage, self.examples, self.config, **self.sequence_tokens, mix_stages=False)
        total, count = torch.zeros((), dtype=torch.float64, device=self.processes.device), 0
        for batch in self.batches(sequences, "validation loss"):
            supervised = len(batch["plan"].targets)
            with self.autocast():
                inputs = to_device(model_args(batch), self.processes.device)
                total += self.model(**inputs).loss.double() * supervised
            count += supervised
        loss, count = self.processes.all_reduce_sum([total.item(), count])
        self.stop.raise_on_all_ranks(self.processes)
        return loss / count

    def predict_all(self, stage: int) -> list[dict]:
        """Generate an answer for every problem at a stage; returns the lines of the predictions file."""
        prompts = get_question_latent_dataset(stage, self.examples, self.config, **self.sequence_tokens)
        predictions, limit = [], self.config.answer_limit
        for batch in self.batches(prompts, "validation answers"):
            with self.autocast():
                inputs = to_device(model_args(batch), self.processes.device)
                output = self.model.generate(**inputs, max_new_tokens=limit)  # (batch, length + new)
            thoughts = (batch["input_ids"] == self.model.latent_token_id).sum(1).tolist()
            new = output[:, batch["input_ids"].shape[1] :].tolist()
            for idx, tokens, count in zip(batch["idx"].tolist(), new, thoughts, strict=True):
                tokens = until_eos(tokens, self.model.eos_token_id, limit)
                tokenizer, problem, example = self.pretrained.tokenizer, self.problems[idx], self.examples[idx]
                predictions.append(score(problem, example, tokens, count, tokenizer, self.config))
        gathered = self.processes.all_gather_object(predictions)
        self.stop.raise_on_all_ranks(self.processes)
        return sorted((prediction for part in gathered for prediction in part), key=lambda p: p["idx"])

    def batches(self, sequences: SequenceDataset, title: str) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's share of a data set in batches of similar length, until a signal comes."""
        size = self.config.batch_size_eval or self.config.batch_size_training
        mine = range(self.processes.rank, len(sequences), self.processes.world_size)
        order = [idx for _, idx in sorted(zip(sequences.lengths(mine), mine, strict=True))]
        parts = [order[start : start + size] for start in range(0, len(order), size)]

        def make(part: list[int]) -> dict:
            return self.collate(sequences.__getitems__(part))

        batches = prefetch_batches(make, parts, self.config, self.processes)
        for batch in progress_bar(self.processes, batches, total=len(parts), desc=title):
            if self.stop.signal:
                return
            yield batch

    def autocast(self):
        """Return the context of bfloat16 arithmetic, if the config asks for it."""
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self.config.bf16)


def mean(predictions: list[dict], key: str) -> float:
    """Return the mean of a number over all predictions."""
    return sum(prediction[key] for prediction in predictions) / len(predictions)


def until_eos(tokens: list[int], eos: int, limit: int) -> list[int]:
    """Cut a row's tokens after its first eos; `generate` leaves out an eos that ends every row at once."""
    if eos in tokens:
        return tokens[: tokens.index(eos) + 1]
    return tokens if len(tokens) == limit else [*tokens, eos]


def predict(problem: dict, idx: int, new: list[int], thoughts: int, tokenizer, config: Config) -> dict:
    """Tokenize a problem and `score` its generated token ids."""
    columns = tokenize_chunk({name: [problem[name]] for name in TEXTS}, [idx], tokenizer)
    return score(problem, {name: value for name, [value] in columns.items()}, new, thoughts, tokenizer, config)


def score(problem: dict, example: dict, new: list[int], thoughts: int, tokenizer, config: Config) -> dict:
    """Make a line of the predictions file from a problem, its `tokenize_chunk`, and generated ids (eos included).

    The expected texts take the same way as the generated one: encoded as in training, cut at the first eos, decoded. So
    the output that a problem is trained on is right with any tokenizer, also one that does not return texts unchanged.
    """
    answer_ids, step_ids, eos = example["answer_tokenized"], example["steps_tokenized"], tokenizer.eos_token_id
    own_special = {*answer_ids, *chain(*step_ids)} & {*tokenizer.all_special_ids} - {eos}

    def decode(ids: Iterable[int]) -> str:
        """Decode ids up to eos. Special tokens are skipped, unless the problem itself has some."""
        return tokenizer.decode(list(takewhile(lambda id: id != eos, ids)), skip_special_tokens=not own_special)

    text = decode(new)
    answer, correct = judge(text, decode(answer_ids), config.numeric_answers)
    prediction = {
        "idx": example["idx"],
        "question": problem["question"],
        "expected": problem["answer"],
        "generated": f"[{thoughts} thought{'s' * (thoughts > 1)}]{text}" if thoughts else text,
        "answer": answer,
        "correct": correct,
        "new_tokens": thoughts + len(new),
    }
    if METHODS[config.method].steps == "written":
        steps = decode(chain(*step_ids))
        written = text.split("#")[: steps.count("#") + 1]
        prediction["cot_match"] = "#".join(written).strip() == steps.strip()
    return prediction


def judge(text: str, target: str, numeric: bool) -> tuple[str | None, bool]:
    """Return the answer in a generated text, and whether it is that of the target, the text of the answer's line.

    numeric: numbers of equal value are equal answers.
    """
    answer, expected = extract_answer(text), extract_answer(target)
    if answer is None or expected is None:
        return answer, False
    own = target.split("#", ANSWER_PREFIX.count("#"))[-1]
    if "#" in own:  # what follows the last "#" is not the whole answer
        correct = normalize(text).endswith(normalize(target))
        return normalize(own) if correct else answer, correct
    return answer, answer == expected or (numeric and is_same_number(answer, expected))


def extract_answer(text: str) -> str | None:
    """Return the normalized text after the last "#" of a generated text, None if it has none."""
    return normalize(text.split("#")[-1]) if "#" in text else None


def normalize(answer: str) -> str:
    """Return an answer as it is compared: without commas and outer blanks."""
    return answer.replace(",", "").strip()


def is_same_number(answer: str, expected: str) -> bool:
    """Return whether two normalized answers are the same number, such as 18 and 18.0."""
    try:
        return Decimal(answer) == Decimal(expected)
    except InvalidOperation:  # not a number
        return False


def write_predictions(predictions: list[dict], path: Path) -> None:
    """Write one JSON line per problem."""
    lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
    with saving(path):
        write_atomic(path, "\n".join(lines) + "\n")


# --- only_eval --------------------------------------------------------------------------------------------------------


def evaluate_checkpoint(validator: Validator) -> None:
    """Evaluate config.load_model_path at its stage and write save_path/name/eval_CHECKPOINT."""
    config, processes, description = validator.config, validator.processes, validator.pretrained.description
    checkpoint, stage = Path(config.load_model_path), evaluation_stage(config, description)
    processes.print(f"evaluating {checkpoint} on {config.val_path} at stage {stage}")
    here = config.resolved() | {"max_new_tokens": config.answer_limit, "stage": stage}
    for key, trained in description.items():
        if here.get(key, trained) != trained:
            why = f" (resume: {config.resume})" if key == "stage" and config.resume else ""
            processes.print(f"warning: {key} is {here[key]} here{why}, but the checkpoint has {trained}")
    digest = processes.run_on_rank0(lambda: content_digest(config.val_path))
    evaluation = validator.validate(stage)
    processes.print(evaluation.summary())
    result = {"checkpoint": str(checkpoint), "val_path": config.val_path, "data_digest": digest}
    result |= {"method": config.method, "stage": stage}
    result |= {"thoughts": num_placeholders(stage, ALL_STEPS, config, training=False)}
    result |= {"problems": len(evaluation.predictions), **evaluation.metrics()}
    if config.numeric_answers:
        result["numeric_answers"] = True
    if not config.debug:
        name = processes.run_on_rank0(lambda: locate(checkpoint).resolve().name)
        directory = config.run_directory / f"eval_{name}"
        processes.run_on_rank0(lambda: write_evaluation(evaluation.predictions, result, directory))
        processes.print(f"predictions and metrics: {directory}")


def write_evaluation(predictions: list[dict], result: dict, directory: Path) -> None:
    """Write predictions_DATA.jsonl and metrics_DATA.yaml; existing files are kept, new names get _2, _3, ..."""
    with saving(directory):
        make_private(directory)
        path = reserve(directory / f"predictions_{data_name(result['val_path'])}.jsonl")
        try:
            write_predictions(predictions, path)
        except BaseException:
            path.unlink()
            raise
        write_atomic(path.with_name(path.stem.replace("predictions", "metrics", 1) + ".yaml"), yaml.safe_dump(result))


def reserve(first: Path) -> Path:
    """Create an empty file under the first free name of NAME, NAME_2, NAME_3, ...; only one process gets each."""
    for number in itertools.count(1):
        path = first if number == 1 else first.with_stem(f"{first.stem}_{number}")
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path


# --- questions to a checkpoint ----------------------------------------------------------------------------------------


@dataclass
class OpenedCheckpoint:
    """A checkpoint with the config and stage that determine its prompts; path: as the user gave it."""

    path: str
    pretrained: Pretrained
    model: Coconut
    config: Config
    stage: int

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model takes, None if any."""
        return getattr(self.pretrained.lm.config, "max_position_embeddings", None)

    def with_thoughts(self, thoughts: int) -> OpenedCheckpoint:
        """Return the same with another number of thoughts (or pauses) in its prompts.

        Raises UserError for a method that has none.
        """
        method = self.config.method
        if not METHODS[method].placeholder:
            raise UserError(f"--thoughts: {self.path} was trained with method {method}, which has none")
        values = {"method": method, "c_thought": 1, "max_latent_stage": thoughts}
        return replace(self, config=Config(values | {"max_new_tokens": self.config.max_new_tokens}), stage=thoughts)

    def prompts(self, questions: list[str]) -> list[dict]:
        """Make prompts as validation does: features with input_ids, attention_mask, position_ids, idx.

        Raises UserError for a question that a data file must not hold either, or a prompt longer than the model's
        positions.
        """
        for question in questions:
            if error := problem_error({"question": question, "answer": "", "steps": []}):
                raise UserError(f"the question: {error}")
        problems = {"question": questions, "answer": [""] * len(questions), "steps": [[]] * len(questions)}
        columns = tokenize_chunk(problems, range(len(questions)), self.pretrained.tokenizer)
        examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        tokens = self.pretrained.sequence_tokens(self.config.method)
        prompts = get_question_latent_dataset(self.stage, [], self.config, **tokens)
        features = [prompts.build(example) for example in examples]
        longest = max(len(feature["input_ids"]) for feature in features)
        if self.positions and longest > self.positions:
            raise UserError(f"the question: {longest} tokens with thoughts, but the model takes {self.positions}")
        return features


def open_checkpoint(path: str, thoughts: int | None = None) -> OpenedCheckpoint:
    """Open a checkpoint for questions; thoughts: how many its prompts hold (None: as many as it was trained with)."""
    path = str(locate(path))
    description = require_description(path, "method", "c_thought", "max_latent_stage", "stage")
    # A question does not tell its number of steps, so pad_latent_to_max keeps its default, True.
    values = {key: description[key] for key in ("method", "c_thought", "max_latent_stage")}
    config = Config(values | {"max_new_tokens": description.get("max_new_tokens")})
    pretrained = load_pretrained(config, path)
    check_model(pretrained.lm, pretrained.tokenizer.eos_token_id, pretrained.source)
    model = Coconut.wrap(pretrained.lm, pretrained.tokenizer)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = OpenedCheckpoint(path, pretrained, model, config, evaluation_stage(config, description))
    return checkpoint if thoughts is None else checkpoint.with_thoughts(thoughts)
