"""Metric logging: metrics.jsonl, wandb and tensorboard."""

from __future__ import annotations

import fcntl
import html
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from components.files import saving
from config import Config, UserError


class MetricLogger:
    """Writes metrics to metrics.jsonl and, as the config's `logger` says, to wandb or tensorboard.

    Args: the run's directory (None: log nowhere), the config, the run id that a continued run keeps, and what the
    checkpoint being continued knows of: the bytes of metrics.jsonl and the finished steps; what is later is cut off.
    """

    def __init__(self, directory: Path | None, config: Config, run_id: str, keep_bytes: int = 0, steps: int = 0):
        self.file = self.backend = self.error = None
        self.name = config.logger
        if directory is None:
            return
        self.path = directory / "metrics.jsonl"
        with saving(self.path):
            self.file = open(self.path, "ab")  # noqa: SIM115 (closed by close)
            lock(self.file, directory)
            self.cut(keep_bytes)
        if config.logger == "wandb":
            self.tell(lambda: setattr(self, "backend", start_wandb(directory, config, run_id)))
        elif config.logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # an optional package

            self.backend = SummaryWriter(str(directory / "tensorboard"), purge_step=steps + 1)

    def cut(self, keep_bytes: int) -> None:
        """Cuts off what the checkpoint does not know of: the steps that will be made again."""
        size = self.path.read_bytes().rfind(b"\n", 0, keep_bytes) + 1  # whole lines
        if size < keep_bytes:
            print(f"warning: {self.path} lacks lines that it had when the checkpoint was saved", flush=True)
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)

    def write(self, metrics: dict, step: int) -> None:
        """Logs named numbers of the given optimizer step. `flush` tells of an error."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
        except OSError as error:
            self.error = error
        if hasattr(self.backend, "add_scalar"):
            self.tell(lambda: [self.backend.add_scalar(name, value, step) for name, value in metrics.items()])
        elif self.backend is not None:
            self.tell(lambda: self.backend.log(metrics, step=step))

    def show(self, name: str, rows: list[dict], step: int) -> None:
        """Shows texts, the same keys in each line: a table of wandb, or the text of one in tensorboard."""
        if self.backend is None:
            return
        columns, lines = list(rows[0]), [list(map(str, row.values())) for row in rows]
        if hasattr(self.backend, "add_text"):
            self.tell(lambda: self.backend.add_text(name, markdown([columns, ["---"] * len(columns), *lines]), step))
        else:
            self.tell(lambda: self.backend.log({name: table(columns, lines)}, step=step))

    def tell(self, function: Callable) -> None:
        """Calls a function of the backend; the run goes on without one that fails."""
        try:
            function()
        except Exception as error:  # whatever a service, its network or its disk may raise
            self.backend = None
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            advice = f"the run goes on, and {self.path} has all metrics"
            print(f"warning: {self.name} failed ({reason}); {advice}", flush=True)

    def flush(self) -> int:
        """Makes what was logged durable and returns the size of metrics.jsonl in bytes."""
        if self.file is None:
            return 0
        with saving(self.path):
            if self.error is not None:
                raise self.error
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Ends the log."""
        if self.file is not None:
            with suppress(OSError):  # flush has complained
                self.file.close()
        if hasattr(self.backend, "add_scalar"):
            self.tell(self.backend.close)
        elif self.backend is not None:
            self.tell(self.backend.finish)


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown whose cells are shown as they are."""
    escaped = [[html.escape(cell).replace("|", "&#124;").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def table(columns: list[str], lines: list[list[str]]):
    """A wandb table."""
    import wandb  # slow to import, and not needed by other loggers

    return wandb.Table(columns=columns, data=lines)


def lock(file, directory: Path) -> None:
    """Claims a run's directory for this process, until it ends. Raises UserError if another one works there."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        advice = "wait for its end or stop it, or choose another name"
        raise UserError(f"name: another process is training in {directory}; {advice}") from error
    except OSError:
        pass  # a file system without locks


def start_wandb(directory: Path, config: Config, run_id: str):
    """A wandb run, offline where no account is set up or it cannot be reached; never asks for one."""
    import wandb  # slow to import, and not needed by other loggers

    settings = {"project": config.project, "name": config.name, "id": run_id, "dir": str(directory)}
    settings |= {"config": config.resolved(), "resume": "allow"}
    if os.environ.get("WANDB_MODE") is None and not wandb.login(prompt=False):
        print(
            "wandb: no account is set up, so this run is logged offline; `wandb sync` uploads it later",
            flush=True,
        )
        return wandb.init(mode="offline", **settings)
    try:
        return wandb.init(**settings)
    except Exception as error:  # its own, and those of the network
        print(f"wandb: {error}; this run is logged offline", flush=True)
        return wandb.init(mode="offline", **settings)
