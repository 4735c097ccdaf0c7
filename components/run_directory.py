"""The directory of a run: who may use it, what may lie in it, and what is set aside instead of overwritten."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from itertools import count
from pathlib import Path

from components.errors import reason
from components.files import make_private, saving, say_once
from config import UserError, is_hub_name

CHECKPOINT = re.compile(r"checkpoint_(\d+)(?:_step_(\d+))?")  # finished epochs; within an epoch, steps of the run
METRICS, CONFIG = "metrics.jsonl", "config.yaml"
FILES = re.compile(rf"{METRICS}|{CONFIG}|predictions_\d+\.jsonl")
FOLDERS = re.compile(rf"{CHECKPOINT.pattern}|tensorboard|wandb")
REMEDY = "change its permissions, or choose another name or save_path"


class Claim:
    """The claim of a run's directory by rank 0 of one start, from before anything there is read until all is written.

    The lock is on metrics.jsonl, which is truncated but never replaced. Where there is none yet, `create` takes it, so
    that a start that is refused before it trains leaves nothing behind.
    """

    def __init__(self):
        self.file = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()  # which unlocks it

    def acquire(self, directory: Path) -> None:
        """Check that the run can use its directory, and lock it. Raises UserError if it cannot."""
        check_directory(directory)
        if (directory / METRICS).exists():
            self.lock(directory)

    def create(self, directory: Path) -> None:
        """Create the directory and lock it, unless `acquire` has. Raises UserError if another run was faster."""
        if self.file is not None:
            return
        with saving(directory):
            make_private(directory)
        self.lock(directory)
        if (directory / METRICS).stat().st_size:
            raise UserError(
                f"name: another process has trained in {directory} since this one started; "
                "start again to resume that run, or choose another name"
            )

    def lock(self, directory: Path) -> None:
        """Lock metrics.jsonl. Raises UserError if another process holds the lock."""
        try:
            self.file = open(directory / METRICS, "ab")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"name: {error.filename} cannot be written: {error.strerror}; {REMEDY}") from error
        os.register_at_fork(after_in_child=self.file.close)  # a worker may outlive a killed run by a moment
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait until it ends, stop it, or choose another name"
            raise UserError(f"name: another process is training in {directory}; {remedy}") from error
        except OSError:
            pass  # a file system without locks


def check_directory(directory: Path) -> None:
    """Raise UserError for a directory that a run could not use; nothing is written or locked."""
    check_writable(directory)
    check_types(directory)


def check_writable(directory: Path) -> None:
    """Raise UserError unless this user can write to a directory, or create it; nothing is written."""
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        remedy = "move it, or choose another name or save_path"
        raise UserError(f"save_path: {existing} is a file where a directory is needed; {remedy}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"save_path: {existing} cannot be written by this user; {REMEDY}")


def check_types(run_directory: Path) -> None:
    """Raise UserError for a file in a run's directory where a folder belongs, or the reverse."""
    for path in sorted(run_directory.glob("*")):
        if (match := CHECKPOINT.fullmatch(path.name)) and not path.is_dir():
            raise UserError(
                f"name: {path} is a file, as the official code saves them, but a run's checkpoints are folders; choose "
                f"another name; to start from the file, set load_model_path={path} resume={match[1]}"
            )
        expected = path.is_file if FILES.fullmatch(path.name) else path.is_dir if FOLDERS.fullmatch(path.name) else None
        if expected and not expected():
            kind = "file" if expected == path.is_file else "folder"
            raise UserError(f"name: {path} should be a {kind}, but is not; move it, or choose another name")


def follow(path: Path) -> Path:
    """Return the checkpoint that a file named best or last names on a file system without links; else the path."""
    if os.path.isfile(path) and path.stat().st_size < 100:  # False, not an error, for a name that no file can have
        name = path.read_text("utf-8", "replace").strip()
        return path.with_name(name) if CHECKPOINT.fullmatch(name) else path
    return path


def locate(given: str | Path) -> Path:
    """Return the folder or file of the checkpoint that a user names: by its path, its run's directory or a hub name.

    Raises UserError if a hub name cannot be loaded. Other paths that do not exist are returned as they are.
    """
    path = Path(given).expanduser()
    if os.path.exists(path / METRICS) and os.path.lexists(path / "best"):
        say_once(f"note: {path} is a run's directory, so its best checkpoint is taken")
        path = path / "best"
    if not os.path.exists(path) and is_hub_name(str(given)):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(given), ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.ot"]))
        except Exception as error:  # the hub's own errors, and those of the network
            where = f"is neither in {os.getcwd()} nor can it be loaded from the hub"
            raise UserError(f"load_model_path: {str(given)!r} {where}: {reason(error)}") from error
    return follow(path)


def set_aside(directory: Path, names: list[str]) -> None:
    """Move what a run would overwrite into a new folder earlier_N of its directory."""
    folder = next(path for number in count(1) if not (path := directory / f"earlier_{number}").exists())
    folder.mkdir(mode=0o700)
    for name in names:
        if name == METRICS:
            shutil.copyfile(directory / name, folder / name)  # the original has the lock, and is truncated
        else:
            os.replace(directory / name, folder / name)
    print(f"note: {', '.join(names)} of {directory} would be overwritten, so the old ones are in {folder}", flush=True)


def set_aside_earlier(run_directory: Path, fresh: bool) -> None:
    """Set aside a config.yaml that the user wrote and, at a fresh start, the metrics and predictions of an earlier one.

    A run whose checkpoints were deleted by hand starts afresh, too.
    """
    names, config = [], run_directory / CONFIG
    if fresh:
        names = sorted(path.name for path in run_directory.glob("predictions_*.jsonl"))
        names += [METRICS] if (run_directory / METRICS).stat().st_size else []
    if config.exists() and (names or not re.search(r"^# run \w+$", config.read_text("utf-8", "replace"), re.MULTILINE)):
        names.append(CONFIG)
    if names:
        set_aside(run_directory, names)
