"""What the tools read of runs: their configs, the versions they ran with, and their curves, epoch by epoch."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import FREE_KEYS, Config, UserError  # noqa: E402

CURVES = {"accuracy": "eval/acc", "validation loss": "eval/loss"}  # of each epoch's validation
DATA_KEYS = ("train_path", "val_path")


@dataclass(frozen=True)
class Finished:
    """What a run's files tell: its resolved config, the versions that it names, and values by finished epochs.

    directory: the run's, or the RUN.yaml of a recorded one; validations: {epoch: its line of the metrics};
    curves: name -> {epoch: value}, those of CURVES and the "training loss", a mean over the epoch's steps;
    stages: {epoch: stage}; steps: {epoch: optimizer steps done by then}.
    """

    directory: Path
    config: dict
    versions: dict[str, str]
    validations: dict[int, dict]
    curves: dict[str, dict[int, float]]
    stages: dict[int, int]
    steps: dict[int, int]

    @property
    def best(self) -> dict:
        """The validation of the checkpoint `best`: the first that is the highest of the newest stage."""
        newest = self.stages[max(self.stages)]
        return max((v for v in self.validations.values() if v["eval/stage"] == newest), key=lambda v: v["eval/acc"])


def files(directory: Path) -> tuple[Path, Path]:
    """Return the config and the metrics of a run's directory, or of a RUN.yaml, which has a RUN.jsonl beside it."""
    if directory.suffix == ".yaml":
        return directory, directory.with_suffix(".jsonl")
    return directory / "config.yaml", directory / "metrics.jsonl"


def find_runs(place: Path) -> list[Path]:
    """Return the runs below a folder, each as read_run takes it; of a RUN.yaml, that alone."""
    if place.is_file():
        return [place]
    recorded = (path for path in place.rglob("*.yaml") if path.with_suffix(".jsonl").exists())
    return sorted([*(path.parent for path in place.rglob("metrics.jsonl")), *recorded])


def read_run(directory: Path) -> Finished:
    """Read a run's config and metrics. Raise UserError where they are missing, damaged or too short."""
    text, metrics = map(read_file, files(directory))
    try:
        config = Config(yaml.safe_load(text)).resolved()
        whole, _, _ = metrics.rpartition("\n")  # a running one has begun another line
        lines = [json.loads(line) for line in whole.splitlines()]
        validations = {line["eval/epoch"]: line for line in lines if "eval/epoch" in line}
        curves = {name: {epoch: line[key] for epoch, line in validations.items()} for name, key in CURVES.items()}
        curves["training loss"] = {epoch: loss for epoch, loss in training_losses(lines) if epoch in validations}
    except (TypeError, KeyError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{directory}: not what run.py writes: {type(error).__name__}: {error}; give the directory of a run"
        ) from error
    if not validations:
        raise UserError(f"{directory}: no epoch of this run has ended yet; wait for its first validation")
    stages, steps = ({epoch: line[key] for epoch, line in validations.items()} for key in ("eval/stage", "step"))
    versions = dict(re.findall(r"^# (?!run )(\w+) (.+)$", text, re.M))  # a run's name is no version
    return Finished(directory, config, versions, validations, curves, stages, steps)


def read_file(path: Path) -> str:
    """The text of one of a run's files."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the directory of a run, save_path/name") from error


def training_losses(lines: list[dict]) -> Iterator[tuple[int, float]]:
    """The mean training loss of each epoch."""
    losses = {}
    for line in lines:
        if "train/loss" in line:
            losses.setdefault(line["train/epoch"], []).append(line["train/loss"])
    return ((epoch, statistics.mean(values)) for epoch, values in losses.items())


def differences(one: Finished, other: Finished) -> dict[str, tuple]:
    """The keys, seed apart, in which two runs were trained or validated differently, each with both values.

    Data are the same where their files are called the same. A batch may be made of other parts: what counts is that an
    epoch takes as many optimizer steps.
    """
    keys = [key for key in one.config if key not in FREE_KEYS - {"val_path"} and key != "seed"]
    pairs = {key: (shown(key, one.config[key]), shown(key, other.config[key])) for key in keys}
    common = one.steps.keys() & other.steps.keys()
    if all(one.steps[epoch] == other.steps[epoch] for epoch in common):
        for key in ("batch_size_training", "gradient_accumulation_steps", "global_batch_size"):
            del pairs[key]
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def shown(key: str, value):
    """A config value as it is compared: files and folders by their names, wherever they are."""
    paths = (*DATA_KEYS, "model_id", "load_model_path")
    return Path(value).name if key in paths and value is not None else value
