"""Validation: loss, generation over a data set, answer extraction, accuracy and the predictions file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from coconut import Coconut
from curriculum import METHODS
from dataset import MyCollator, SequenceDataset
from utils import Config, Processes


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


def evaluate(
    model: Coconut,
    sequences: SequenceDataset,
    prompts: SequenceDataset,
    problems: list[dict],
    collator: MyCollator,
    tokenizer,
    config: Config,
    processes: Processes,
) -> Evaluation:
    """Validates the model on problems, given as training sequences (for the loss) and as prompts (for answers).

    Every problem counts once, on any number of processes; all of them return the same result.
    """
    model.eval()
    loss = mean_loss(model, sequences, collator, config, processes)
    started = time.perf_counter()
    predictions = []
    for batch, tokens in generate_all(model, prompts, collator, config, processes):
        thoughts = (batch["input_ids"] == model.latent_token_id).sum(1).tolist()
        for idx, new, count in zip(batch["idx"].tolist(), tokens, thoughts, strict=True):
            predictions.append(predict(problems[idx], idx, new, count, tokenizer, config.method))
    seconds = max(processes.gather(time.perf_counter() - started)) / len(problems)
    predictions = sorted((p for part in processes.gather(predictions) for p in part), key=lambda p: p["idx"])
    writes_steps = METHODS[config.method].steps == "kept"
    return Evaluation(
        loss,
        mean(p["correct"] for p in predictions),
        mean(p["cot_match"] for p in predictions) if writes_steps else None,
        mean(p["new_tokens"] for p in predictions),
        seconds,
        predictions,
    )


def mean(values) -> float:
    """The mean of some numbers or booleans."""
    values = list(values)
    return sum(values) / len(values)


def mean_loss(
    model: Coconut, sequences: SequenceDataset, collator: MyCollator, config: Config, processes: Processes
) -> float:
    """The mean cross entropy over all supervised tokens of a data set."""
    total = torch.zeros(2, dtype=torch.float64, device=processes.device)  # loss, supervised tokens
    for batch in batches(sequences, collator, config, processes, "validation loss"):
        batch.pop("idx")
        count = (batch["labels"][:, 1:] != -100).sum().to(processes.device)
        with torch.no_grad(), autocast(config, processes):
            loss = model(**to_device(batch, processes)).loss
        total += torch.stack([loss.double() * count, count.double()])
    loss, count = processes.sum(total.tolist())
    return loss / count


def generate_all(
    model: Coconut, prompts: SequenceDataset, collator: MyCollator, config: Config, processes: Processes
) -> Iterator[tuple[dict, list[list[int]]]]:
    """Yields each batch of this process's prompts with its rows' new tokens, up to and including their first eos."""
    limit = config.max_new_tokens or (64 if "gsm" in config.val_path else 128)
    for batch in batches(prompts, collator, config, processes, "validation answers"):
        inputs = to_device({key: batch[key] for key in ("input_ids", "attention_mask")}, processes)
        with autocast(config, processes):
            output = model.generate(**inputs, max_new_tokens=limit)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        yield batch, [until_eos(row, model.eos_token_id, limit) for row in new]


def until_eos(tokens: list[int], eos: int, limit: int) -> list[int]:
    """A row's tokens up to and including its first eos; generate leaves out an eos that ends every row at once."""
    if eos in tokens:
        return tokens[: tokens.index(eos) + 1]
    return tokens if len(tokens) == limit else [*tokens, eos]


def batches(
    dataset: SequenceDataset, collator: MyCollator, config: Config, processes: Processes, title: str
) -> Iterator[dict[str, Tensor]]:
    """Yields this process's share of a data set in batches of sequences of similar length, with a progress bar."""
    size = config.batch_size_eval or config.batch_size_training
    mine = range(processes.rank, len(dataset), processes.world_size)
    order = sorted(mine, key=lambda i: len(dataset[i]["input_ids"]))
    starts = range(0, len(order), size)
    for start in tqdm(starts, desc=title, leave=False, disable=not processes.is_main):
        yield collator([dataset[i] for i in order[start : start + size]])


def to_device(batch: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The batch on this process's device."""
    return {key: value.to(processes.device, non_blocking=True) for key, value in batch.items()}


def autocast(config: Config, processes: Processes):
    """bfloat16 arithmetic over float32 weights, where the config asks for it."""
    return torch.autocast(processes.device.type, dtype=torch.bfloat16, enabled=config.bf16)


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
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def show_examples(predictions: list[dict], count: int = 3) -> str:
    """A few predictions as text for the terminal."""
    return "\n".join(
        f"  [{'right' if p['correct'] else 'wrong'}] ...{p['question'][-60:]}\n"
        f"    expected {p['expected']!r}, generated {p['generated']!r}"
        for p in predictions[:count]
    )
