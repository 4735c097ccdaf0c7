"""Metric logging: metrics.jsonl, wandb and tensorboard."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from components.errors import reason
from components.files import saving
from config import Config


class MetricLogger:
    """Log metrics to metrics.jsonl and, as the config's `logger` says, to wandb or tensorboard.

    Args:
        directory: the run's; None logs nowhere.
        run_id: identifies the run to wandb; a resumed run keeps it.
        keep_bytes, steps: size of metrics.jsonl and finished optimizer steps as of the checkpoint that is resumed;
            what was logged later is dropped.

    Raises:
        SaveError: metrics.jsonl cannot be written.
    """

    def __init__(self, directory: Path | None, config: Config, run_id: str, keep_bytes: int = 0, steps: int = 0):
        self.file = self.backend = self.error = None
        self.name = config.logger
        if directory is None:
            return
        self.path = directory / "metrics.jsonl"
        with saving(self.path):
            self.file = open(self.path, "ab")  # noqa: SIM115 (closed by close)
            self.truncate(keep_bytes)
        if config.logger == "wandb":
            self.call_backend(lambda: setattr(self, "backend", start_wandb(directory, config, run_id)))
        elif config.logger == "tensorboard":
            self.call_backend(lambda: setattr(self, "backend", start_tensorboard(directory, steps)))

    def truncate(self, keep_bytes: int) -> None:
        """Drop the lines of metrics.jsonl after the first keep_bytes bytes: their steps will be repeated."""
        size = self.path.read_bytes().rfind(b"\n", 0, keep_bytes) + 1  # whole lines
        if size < keep_bytes:
            print(f"warning: {self.path} lacks lines that it had when the checkpoint was saved", flush=True)
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)

    def write(self, metrics: dict, step: int) -> None:
        """Log named numbers at an optimizer step. A full disk is reported by `flush`."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        except OSError as error:
            self.error = error
        if hasattr(self.backend, "add_scalar"):
            self.call_backend(lambda: [self.backend.add_scalar(name, value, step) for name, value in metrics.items()])
        elif self.backend is not None:
            self.call_backend(lambda: self.backend.log(metrics, step=step))

    def show(self, name: str, rows: list[dict], step: int) -> None:
        """Log rows of texts, all with the same keys, as a wandb table or a tensorboard text."""
        if self.backend is None:
            return
        columns, cells = list(rows[0]), [list(map(str, row.values())) for row in rows]
        if hasattr(self.backend, "add_text"):
            text = markdown_table([columns, ["---"] * len(columns), *cells])
            self.call_backend(lambda: self.backend.add_text(name, text, step))
        else:
            import wandb  # slow to import, and not needed by other loggers

            self.call_backend(lambda: self.backend.log({name: wandb.Table(columns=columns, data=cells)}, step=step))

    def call_backend(self, function: Callable) -> None:
        """Call a function of the backend. If it fails, the run continues without the backend."""
        try:
            function()
        except Exception as error:  # whatever a service, its network or its disk may raise
            self.backend = None
            print(
                f"warning: {self.name} failed ({reason(error)}); the run continues, and {self.path} has all metrics",
                flush=True,
            )

    def flush(self) -> int:
        """Make everything logged so far durable. Returns the size of metrics.jsonl in bytes."""
        if self.file is None:
            return 0
        with saving(self.path):
            if self.error is not None:
                raise self.error
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Close metrics.jsonl and the backend."""
        if self.file is not None:
            with suppress(OSError):  # flush has reported it
                self.file.close()
        if hasattr(self.backend, "add_scalar"):
            self.call_backend(self.backend.close)
        elif self.backend is not None:
            self.call_backend(self.backend.finish)


def markdown_table(rows: list[list[str]]) -> str:
    """Format rows as a Markdown table whose cells are escaped."""
    escaped = [[html.escape(cell).replace("|", "&#124;").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


def start_tensorboard(directory: Path, steps: int):
    """Open the run's tensorboard log; what it has after the first `steps` optimizer steps is hidden."""
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(str(directory / "tensorboard"), purge_step=steps + 1)


def start_wandb(directory: Path, config: Config, run_id: str):
    """Start a wandb run; offline if no account is set up or wandb cannot be reached. Never prompts for an account."""
    import wandb  # slow to import, and not needed by other loggers

    settings = {"project": config.project, "name": config.name, "id": run_id, "dir": str(directory)}
    settings |= {"config": config.resolved(), "resume": "allow"}
    if os.environ.get("WANDB_MODE") is None and not wandb.login(prompt=False):
        print("wandb: no account is set up, so this run is logged offline; `wandb sync` uploads it later", flush=True)
        return wandb.init(mode="offline", **settings)
    try:
        return wandb.init(**settings)
    except Exception as error:  # wandb's own errors, and those of the network
        print(f"wandb: {error}; this run is logged offline", flush=True)
        return wandb.init(mode="offline", **settings)
