"""A small experiment for tests of faults and several ranks, and the comparison of its runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from components.run_directory import follow
from helpers import (
    byte_tokenizer,
    make_problems,
    read_lines,
    save_model,
    tiny_gpt2,
    training_state,
    words,
    write_json,
)
from helpers.faults import Fault, Outcome, launch

TIMING = ("tokens_per_second", "seconds")  # suffixes of the metrics that are timings


class Setting:
    """A small experiment with everything that resume must restore: dropout, uniform_prob, stage switches, warm-up.

    14 problems make 4 optimizer steps in each of 4 epochs (2 steps with two ranks); the last step is smaller.
    """

    def __init__(self, directory: Path, dropout: float = 0.1):
        self.directory = directory
        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        model = tiny_gpt2(len(tokenizer), positions=192, dropout=dropout)
        self.config = directory / "config.yaml"
        self.config.write_text("method: coconut\nlogger: none\n")
        self.values = {
            "save_path": str(directory),
            "model_id": save_model(directory / "model", model, tokenizer),
            "train_path": write_json(directory / "train.json", make_problems(14)),
            "val_path": write_json(directory / "valid.json", make_problems(5, seed=1)),
            "num_epochs": 4,
            "epochs_per_stage": 2,
            "max_latent_stage": 1,
            "uniform_prob": 0.3,
            "reset_optimizer": True,
            "batch_size_training": 2,
            "gradient_accumulation_steps": 2,
            "max_new_tokens": 4,
            "save_every_steps": 3,
            "lr": 0.01,
            "warmup_steps": 3,
            "max_grad_norm": 1.0,
        }

    def words(self, name: str, **changes) -> list[str]:
        """The arguments of run.py for a run."""
        return [str(self.config), *words({**self.values, "name": name, **changes})]

    def run(self, name: str, ranks: int = 1, fault: Fault | None = None, **changes) -> Outcome:
        """Forks a run, which writes to directory/name."""
        return launch(self.words(name, **changes), ranks, fault)

    def reference(self, ranks: int = 1, **changes) -> Path:
        """The directory of an uninterrupted run (made once)."""
        directory = self.directory / "-".join(["reference", str(ranks), *(f"{k}={v}" for k, v in changes.items())])
        if not directory.exists():
            outcome = self.run(directory.name, ranks, **changes)
            assert outcome.codes == [0] * ranks, outcome.output
        return directory


def metrics(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl without timings."""
    lines = read_lines(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith(TIMING)} for line in lines]


def flat_state(checkpoint: Path) -> dict:
    """The training state of a checkpoint as {path: value}, without the run id and the length of metrics.jsonl."""
    flat = {}

    def collect(prefix: str, value) -> None:
        children = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        for key, child in children:
            collect(f"{prefix}/{key}", child)
        if not isinstance(value, dict | list | tuple):
            flat[prefix] = value

    collect("", training_state(checkpoint))
    return {name: value for name, value in flat.items() if not name.endswith(("/run_id", "/metrics_bytes"))}


def differences(mine: dict, theirs: dict) -> list[str]:
    """The names whose tensors or other values are not bit-identical in two mappings."""

    def same(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return [
        name
        for name in {**mine, **theirs}
        if name not in mine or name not in theirs or not same(mine[name], theirs[name])
    ]


def assert_same(run: Path, reference: Path) -> None:
    """Two finished runs are bit-identical: weights, optimizer and random states, metrics, predictions, best, last."""
    assert metrics(run) == metrics(reference)
    for link in ("best", "last"):
        assert follow(run / link).resolve().name == os.readlink(reference / link)
    weights = [load_file(follow(directory / "last") / "model.safetensors") for directory in (run, reference)]
    assert differences(*weights) == []
    states = [flat_state(follow(directory / "last")) for directory in (run, reference)]
    assert differences(*states) == [] and any(name.startswith("/optimizer/") for name in states[0])
    names = sorted(path.name for path in reference.glob("predictions_*"))
    assert sorted(path.name for path in run.glob("predictions_*")) == names
    for name in names:
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    assert not list(run.glob("*.partial"))
