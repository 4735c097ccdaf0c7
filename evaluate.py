"""Validation: loss, generation over a data set, answer extraction, accuracy and the predictions file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from build import Run, inputs
from coconut import Coconut
from components.export import DESCRIPTION
from components.files import saving, write_atomic
from components.parallelize import unsharded
from components.pretrained import Pretrained, load_pretrained, read_description
from components.tokenization import tokenize_chunk
from config import Config, UserError
from curriculum import METHODS
from dataset import SequenceDataset, get_cot_latent_dataset, get_question_latent_dataset


@dataclass
class Evaluation:
    """The outcome of one validation; the rates are fractions of all problems.

    loss: mean cross entropy over all supervised tokens; cot_match: None for methods that do not write steps;
    new_tokens: mean number of generated tokens (eos and thoughts counted, as in the paper's Table 1);
    seconds: mean generation time per problem; predictions: one dict per problem, in the data's order.
    """

    loss: float
    accuracy: float
    cot_match: float | None
    new_tokens: float
    seconds: float
    predictions: list[dict]

    def metrics(self) -> dict[str, float]:
        """The numbers under their names in metrics.jsonl."""
        named = {
            "loss": self.loss,
            "acc": self.accuracy,
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
        }
        if self.cot_match is not None:
            named["cot_em"] = self.cot_match
        return {f"eval/{name}": value for name, value in named.items()}

    def summary(self, count: int = 3) -> str:
        """The result with the first few predictions, for the terminal."""
        cot = "" if self.cot_match is None else f", CoT match {self.cot_match:.1%}"
        lines = [
            f"validation: accuracy {self.accuracy:.1%}{cot}, loss {self.loss:.4f}, "
            f"{self.new_tokens:.1f} tokens and {self.seconds:.4f} s per problem"
        ]
        for p in self.predictions[:count]:
            lines.append(f"  [{'right' if p['correct'] else 'wrong'}] ...{p['question'][-60:]}")
            lines.append(f"    expected {p['expected']!r}, generated {p['generated']!r}")
        return "\n".join(lines)


def validate(run: Run, stage: int) -> Evaluation:
    """Validates the run's model at a stage, and prints the result with a few examples.

    Every problem counts once, on any number of processes; all of them return the same result. Raises Interrupted
    where a signal asks for an end, as soon as all processes know.
    """
    run.model.eval()
    with torch.no_grad(), unsharded(run.model, run.keep_weights):
        loss = mean_loss(run, run.sequences(get_cot_latent_dataset, stage, run.valid_examples, mix_stages=False))
        started = time.perf_counter()
        predictions = answers(run, run.sequences(get_question_latent_dataset, stage, run.valid_examples))
        [seconds] = run.processes.max([time.perf_counter() - started])
    evaluation = Evaluation(
        loss,
        mean(p["correct"] for p in predictions),
        mean(p["cot_match"] for p in predictions) if METHODS[run.config.method].steps == "kept" else None,
        mean(p["new_tokens"] for p in predictions),
        seconds / len(predictions),
        predictions,
    )
    run.processes.print(evaluation.summary())
    return evaluation


def mean(values) -> float:
    """The mean of some numbers or booleans."""
    values = list(values)
    return sum(values) / len(values)


def mean_loss(run: Run, sequences: SequenceDataset) -> float:
    """The mean cross entropy over all supervised tokens of a data set."""
    total, count = torch.zeros((), dtype=torch.float64, device=run.processes.device), 0
    for batch in batches(run, sequences, "validation loss"):
        supervised = len(batch["plan"].targets)
        with run.autocast():
            total += run.model(**inputs(batch)).loss.double() * supervised
        count += supervised
    loss, count = run.processes.sum([total.item(), count])
    run.stop_together()
    return loss / count


def answers(run: Run, prompts: SequenceDataset) -> list[dict]:
    """The predictions for all prompts of a data set, in its order."""
    limit = run.config.answer_limit
    predictions = []
    for batch in batches(run, prompts, "validation answers"):
        with run.autocast():
            output = run.model.generate(**inputs(batch), max_new_tokens=limit)  # (batch, length + new)
        thoughts = (batch["input_ids"] == run.model.latent_token_id).sum(1).tolist()
        new = output[:, batch["input_ids"].shape[1] :].tolist()
        for idx, tokens, count in zip(batch["idx"].tolist(), new, thoughts, strict=True):
            tokens = until_eos(tokens, run.model.eos_token_id, limit)
            tokenizer, problem = run.pretrained.tokenizer, run.valid_problems[idx]
            predictions.append(predict(problem, idx, tokens, count, tokenizer, run.config.method))
    parts = run.processes.gather(predictions)
    run.stop_together()
    return sorted((prediction for part in parts for prediction in part), key=lambda p: p["idx"])


def until_eos(tokens: list[int], eos: int, limit: int) -> list[int]:
    """A row's tokens up to and including its first eos; generate leaves out an eos that ends every row at once."""
    if eos in tokens:
        return tokens[: tokens.index(eos) + 1]
    return tokens if len(tokens) == limit else [*tokens, eos]


def batches(run: Run, dataset: SequenceDataset, title: str) -> Iterator[dict[str, Tensor]]:
    """Yields this process's share of a data set in batches of sequences of similar length, until a signal comes."""
    size = run.config.batch_size_eval or run.config.batch_size_training
    mine = range(run.processes.rank, len(dataset), run.processes.world_size)
    order = [idx for _, idx in sorted(zip(dataset.lengths(mine), mine, strict=True))]
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    made = run.ahead(lambda part: run.collate(dataset.__getitems__(part)), parts)
    for batch in tqdm(made, total=len(parts), desc=title, leave=False, disable=not run.processes.is_rank0):
        if run.stop.signal:
            return
        yield batch


def predict(problem: dict, idx: int, new: list[int], thoughts: int, tokenizer, method: str) -> dict:
    """One line of the predictions file, from the generated token ids (eos included)."""
    text = tokenizer.decode(new, skip_special_tokens=True)
    answer = extract_answer(text)
    prediction = {
        "idx": idx,
        "question": problem["question"],
        "expected": problem["answer"],
        "generated": f"[{thoughts} thought{'s' * (thoughts > 1)}]{text}" if thoughts else text,
        "answer": answer,
        "correct": answer == normalize(problem["answer"]),
        "new_tokens": thoughts + len(new),
    }
    if METHODS[method].steps == "kept":
        prediction["cot_match"] = text.split("#")[0].strip() == "\n".join(problem["steps"])
    return prediction


def extract_answer(text: str) -> str | None:
    """The answer in a generated text: what follows the last "#", normalized; None where nothing is marked as one."""
    return normalize(text.split("#")[-1]) if "#" in text else None


def normalize(answer: str) -> str:
    """An answer as it is compared: no commas, no outer blanks."""
    return answer.replace(",", "").strip()


def write_predictions(predictions: list[dict], path: Path) -> None:
    """Writes one JSON line per problem."""
    lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
    with saving(path):
        write_atomic(path, "\n".join(lines) + "\n")


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
        problems = {"question": questions, "answer": [""] * len(questions), "steps": [[]] * len(questions)}
        columns = tokenize_chunk(problems, range(len(questions)), tokenizer)
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
