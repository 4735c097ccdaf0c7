"""What run.py shows: help on every key; on rank 0 its size, a progress line, a row per epoch, and how to go on."""

from __future__ import annotations

import io
import os
import platform
import resource
import sys
import textwrap
import time
from dataclasses import Field, fields

import huggingface_hub
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from components.distributed import Processes
from components.run_directory import follow
from config import Config
from curriculum import METHODS, schedule_table

RECENT = 50  # steps over which the progress line averages
GROUPS = {  # the first key of each group
    "project": "General",
    "method": "Method",
    "c_thought": "Curriculum",
    "remove_per_epoch": "Curriculum of icot (Deng et al. 2024)",
    "model_id": "Model",
    "train_path": "Data",
    "seed": "Training",
    "eval_every_epochs": "Validation and checkpoints",
}


class Display:
    """Shows the progress of a training run: in a terminal a line that is redrawn, elsewhere one per tenth of an epoch.

    Methods are called on every rank, and show on rank 0. Nothing here reads from a GPU.
    """

    def __init__(self, config: Config, processes: Processes):
        self.config, self.processes = config, processes
        self.started, self.after_steps, self.has_header, self.line = time.monotonic(), 0.0, False, None

    def header(self, lm: PreTrainedModel, train: int, valid: int) -> None:
        """Show what is trained, on what and where; train, valid: numbers of problems."""
        config, shape, size = self.config, lm.config, sum(p.numel() for p in lm.parameters()) / 1e6
        model = f"{shape.model_type} {shape.num_hidden_layers}x{shape.hidden_size} ({size:.1f}M)"
        facts = [config.method, config.name, model, devices(self.processes), f"{train:,} train / {valid:,} valid"]
        self.processes.print(f"{' · '.join(facts)}\nrun directory: {config.run_directory}\n{schedule_table(config)}")

    def start_epoch(self, epoch: int, done: int, total: int) -> None:
        """Begin the epoch after `epoch` finished ones, of whose `total` optimizer steps `done` are done."""
        self.epoch, self.done, self.total, self.steps = epoch, done, total, []
        self.epoch_started = self.steps_ended = time.monotonic()
        self.line = progress_bar(self.processes, bar_format="{desc}")

    def step(self, stage: int, loss: float, tokens: float, seconds: float) -> None:
        """Show a finished optimizer step; tokens: over all ranks."""
        self.done, self.steps_ended = self.done + 1, time.monotonic()
        self.steps.append((loss, tokens, seconds))
        if self.line.disable and self.done * 10 // self.total == (self.done - 1) * 10 // self.total:
            return
        loss, speed, seconds = averages(self.steps[-RECENT:])
        epochs, filled = self.config.num_epochs, 20 * self.done // self.total
        left = ((epochs - self.epoch) * self.total - self.done) * seconds + (epochs - self.epoch) * self.after_steps
        passed, left = map(tqdm.format_interval, (self.steps_ended - self.epoch_started, left))
        parts = [f"epoch {self.epoch + 1}/{epochs} stage {stage}", f"{self.done}/{self.total}", f"loss {loss:.3f}"]
        parts += [f"{speed / 1000:.1f}k tok/s", f"{peak_memory(self.processes.device):.1f} GB"]
        parts += [f"{passed}, about {left} left"]
        if self.line.disable:
            self.processes.print("  ".join(parts))
        else:
            parts.insert(1, "━" * filled + "─" * (20 - filled))
            self.line.set_description_str("  ".join(parts), refresh=False)
            self.line.update()

    def end_steps(self) -> None:
        """Remove the progress line, if there is one: what follows are validation and saving."""
        if self.line is not None:
            self.line.close()

    def end_epoch(self, stage: int, metrics: dict[str, float], saved: str) -> None:
        """Show a row with an epoch's training loss and the metrics of its validation ({}: none); saved: last column."""
        now, (loss, speed, _) = time.monotonic(), averages(self.steps)
        self.after_steps = now - self.steps_ended
        row = {"epoch": f"{self.epoch + 1}", "stage": f"{stage}", "train": f"{loss:.3f}"}
        columns = {"valid": ("eval/loss", ".3f"), "acc": ("eval/acc", ".1%")}
        if "eval/cot_em" in metrics or (not metrics and METHODS[self.config.method].steps == "written"):
            columns["CoT"] = ("eval/cot_em", ".1%")
        row |= {name: format(metrics[key], kind) if key in metrics else "-" for name, (key, kind) in columns.items()}
        row |= {"tok/s": f"{speed / 1000:.1f}k", "time": tqdm.format_interval(now - self.epoch_started)}
        if not sys.stdout.isatty():  # rows of a log stand apart
            return self.processes.print("  ".join(f"{name} {cell}" for name, cell in row.items()), "", saved)
        if not self.has_header:
            self.processes.print("".join(f"{name:>8}" for name in row) + "  saved")
        self.has_header = True
        self.processes.print("".join(f"{cell:>8}" for cell in row.values()) + f"  {saved}")

    def finish(self, accuracy: float) -> None:
        """Show how long the run took, the accuracy of its best checkpoint, and what to do with it."""
        took, best = tqdm.format_interval(time.monotonic() - self.started), self.config.run_directory / "best"
        self.processes.print(f"done in {took} · {accuracy:.1%} valid ({follow(best).resolve().name})")
        self.processes.print(f'  ask:   python scripts/ask.py {best} "..."')
        self.processes.print(f"  look:  python scripts/analyze.py {best}")


def progress_bar(processes: Processes, items=None, **options) -> tqdm:
    """Return a bar of tqdm that is shown on rank 0 if it prints to a terminal, and removed at its end."""
    hidden = not (processes.is_rank0 and sys.stdout.isatty())
    return tqdm(items, file=sys.stdout, leave=False, dynamic_ncols=True, disable=hidden, **options)


class Output(io.FileIO):
    """A standard stream that drops what it cannot write: to a closed pipe, or to a log on a full disk."""

    def write(self, data) -> int:
        """Write bytes; returns how many of them are dealt with."""
        try:
            return super().write(data) or len(data)  # None: a terminal that does not wait
        except OSError:
            return len(data)


def print_without_errors() -> None:
    """Replace stdout and stderr so that printing never ends a run; characters that they lack are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
        text = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
        setattr(sys, name, text)


def quiet_libraries() -> None:
    """Silence bars and notes of libraries that say nothing of a run; errors are exceptions, and not affected."""
    transformers.logging.disable_progress_bar()  # of loading weights
    if not sys.stdout.isatty():  # a log would get a line for each refresh
        huggingface_hub.utils.disable_progress_bars()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported


def devices(processes: Processes) -> str:
    """Return how many processes compute on what, by rank 0's kind of device."""
    name = f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})"
    if processes.device.type == "cuda":
        name = torch.cuda.get_device_name(processes.device)
    return f"{processes.world_size} x {name}"


def averages(steps: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Return the mean loss of steps (loss, tokens, seconds), their tokens per second, and their mean seconds."""
    loss, tokens, seconds = (sum(column) for column in zip(*steps, strict=True)) if steps else [float("nan")] * 3
    return loss / max(len(steps), 1), tokens / seconds, seconds / max(len(steps), 1)


def peak_memory(device: torch.device) -> float:
    """Return the most memory of its device that this process has used, in GB, as its allocator has counted it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def meaning(option: Field) -> str:
    """Return what a key means, with its valid values if they are a few."""
    choices = ", ".join(str(choice) for choice in option.metadata["choices"] if choice is not None)
    return option.metadata["doc"] + (f" ({choices})" if choices else "")


def describe_keys() -> str:
    """Describe all keys with their defaults, group by group."""
    lines = []
    for key in fields(Config):
        lines += ["", GROUPS[key.name]] if key.name in GROUPS else []
        text = textwrap.wrap(meaning(key), 80)
        lines += [f"  {f'{key.name}={key.default}':<35} {text[0]}", *(f"{'':38}{line}" for line in text[1:])]
    return "\n".join(lines).strip()
