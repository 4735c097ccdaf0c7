"""Read runs: config, versions, and metrics by epoch."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import BATCH_KEYS, FREE_KEYS, Config, UserError, listed, read_yaml  # noqa: E402

CURVES = {"accuracy": "eval/acc", "validation loss": "eval/loss"}  # of each epoch's validation
DATA_KEYS = ("train_path", "val_path")


@dataclass(frozen=True)
class FinishedRun:
    """A run, read from its files.

    directory: the run directory, or the RUN.yaml of a recorded run; versions: those in the comments of its config;
    validations: {epoch: its line of the metrics}; curves: {name: {epoch: value}}, those of CURVES and "training loss"
    (mean over the steps of an epoch); stages: {epoch: stage}; steps: {epoch: optimizer steps so far}.
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
        """Return the validation of the checkpoint `best`: the first with the highest accuracy of the newest stage."""
        newest = self.stages[max(self.stages)]
        return max((v for v in self.validations.values() if v["eval/stage"] == newest), key=lambda v: v["eval/acc"])


def files(directory: Path) -> tuple[Path, Path]:
    """Return the paths of config and metrics of a run directory or a recorded run (RUN.yaml, with RUN.jsonl)."""
    if directory.suffix == ".yaml":
        return directory, directory.with_suffix(".jsonl")
    return directory / "config.yaml", directory / "metrics.jsonl"


def find_runs(folder: Path) -> list[Path]:
    """Find the runs in a folder, as paths for read_run; a RUN.yaml is returned as it is."""
    if folder.is_file():
        return [folder]
    recorded = (path for path in folder.rglob("*.yaml") if path.with_suffix(".jsonl").exists())
    return sorted([*(path.parent for path in folder.rglob("metrics.jsonl")), *recorded])


def read_run(directory: Path) -> FinishedRun:
    """Read the config and metrics of a run.

    Raises: UserError if they are missing or invalid, or if no epoch is finished.
    """
    text, metrics = map(read_file, files(directory))
    try:
        config = Config(read_yaml(files(directory)[0])).resolved()
        complete, _, _ = metrics.rpartition("\n")  # the last line of a running job may be incomplete
        lines = [json.loads(line) for line in complete.splitlines()]
        validations = {line["eval/epoch"]: line for line in lines if "eval/epoch" in line}
        curves = {name: {epoch: line[key] for epoch, line in validations.items()} for name, key in CURVES.items()}
        curves["training loss"] = {epoch: loss for epoch, loss in training_losses(lines) if epoch in validations}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{directory}: invalid config or metrics ({type(error).__name__}: {error}); pass a run directory"
        ) from error
    if not validations:
        raise UserError(f"{directory}: no finished epoch; wait for the first validation")
    stages, steps = ({epoch: line[key] for epoch, line in validations.items()} for key in ("eval/stage", "step"))
    versions = dict(re.findall(r"^# (?!run )(\w+) (.+)$", text, re.M))  # "# run NAME" is not a version
    return FinishedRun(directory, config, versions, validations, curves, stages, steps)


def read_file(path: Path) -> str:
    """Read a file of a run; raise UserError if that fails."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); pass a run directory, save_path/name") from error


def training_losses(lines: list[dict]) -> Iterator[tuple[int, float]]:
    """Average the training loss of each epoch."""
    losses = {}
    for line in lines:
        if "train/loss" in line:
            losses.setdefault(line["train/epoch"], []).append(line["train/loss"])
    return ((epoch, statistics.mean(values)) for epoch, values in losses.items())


def differences(one: FinishedRun, other: FinishedRun) -> dict[str, tuple]:
    """Find the keys, except the seed, that make two runs differ in training or validation: {key: (value, other value)}.

    Data files are compared by name. The batch keys count only if an epoch takes a different number of optimizer steps.
    """
    keys = [key for key in one.config if key not in FREE_KEYS - {"val_path"} and key != "seed"]
    pairs = {key: (display_value(key, one.config[key]), display_value(key, other.config[key])) for key in keys}
    common = one.steps.keys() & other.steps.keys()
    if all(one.steps[epoch] == other.steps[epoch] for epoch in common):
        for key in BATCH_KEYS:
            del pairs[key]
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def display_value(key: str, value):
    """Return a config value for comparison; paths are reduced to their last part."""
    paths = (*DATA_KEYS, "model_id", "load_model_path")
    return ", ".join(Path(path).name for path in listed(value)) if key in paths and value is not None else value
