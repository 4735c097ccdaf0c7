"""Small things that everyone uses: signals, seeding, and files and directories that are complete or not there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from config import Config, UserError
from parsing import parse_json

__all__ = [
    "Config",
    "Interrupted",
    "SaveError",
    "StopRequest",
    "make_private",
    "saving",
    "set_seed",
    "write_text",
]  # Config: official

MANIFEST = "manifest.json"


class SaveError(Exception):
    """Something of a run could not be written; every earlier checkpoint is as it was."""


class Interrupted(Exception):
    """A signal asked the run to stop; all processes raise it together."""

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns what goes wrong while something is written (a full, read-only or failing disk) into a SaveError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # besides OSError, the libraries have errors of their own for a full disk
        advice = "earlier checkpoints are as they were; make room, and the same command continues the run"
        raise SaveError(f"{path} could not be written: {error}; {advice}") from error


def set_seed(seed: int, rank: int | None = None) -> None:
    """Seeds Python's and torch's generators, on the CPU and every GPU; with a rank, a stream of its own for each."""
    if rank is not None:
        seed = random.Random(f"{seed} {rank}").getrandbits(32)
    random.seed(seed)
    torch.manual_seed(seed)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file in one atomic step: a reader, or a crash, finds the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yields an empty directory beside `directory`, which takes its place when the block has filled it.

    A manifest with the sizes and checksums of the files comes last, and all is synced before the directory is renamed.
    So a directory that is there is complete, unless the disk fails. After an error nothing is left of the new one.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # a crash left it
    try:
        make_private(partial.parent)
        partial.mkdir(mode=0o700)
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {path.relative_to(partial).as_posix(): fingerprint(path) for path in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            sync(path)
        shutil.rmtree(directory, ignore_errors=True)  # a damaged one
        os.replace(partial, directory)
        sync(directory.parent)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise


def make_private(directory: Path) -> None:
    """Makes a directory and its missing parents for this user alone; what is there stays as it is."""
    for path in (*reversed(directory.parents), directory):
        path.mkdir(mode=0o700, exist_ok=True)


def damage(directory: Path, unread: set[str] = frozenset()) -> str | None:
    """What is wrong with the files of a directory, but for `unread` ones, measured against its manifest, or None."""
    try:
        manifest = read_manifest(directory)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest.items():
        if name in unread:
            continue
        path = directory / name
        if not os.path.isfile(path):  # False, and no error, for a name that no file can have
            return f"{name} is missing"
        if fingerprint(path) != expected:
            return f"{name} differs from its manifest"
    return None


def read_manifest(directory: Path) -> dict[str, dict]:
    """The size and checksum of every file that belongs to a directory. Raises OSError or ValueError."""
    manifest = parse_json((directory / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError(f"{directory / MANIFEST} holds no mapping")
    return manifest


def fingerprint(path: Path) -> dict:
    """The size and checksum of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StopRequest:
    """SIGTERM and SIGINT as a wish, which the training loop grants at its next step.

    A second signal ends the process at once; but one that follows closely is the same wish, delivered by the
    terminal and by torchrun. Used as a context manager, which restores the handlers that were there.
    """

    SAME_WISH = 2.0  # seconds

    def __init__(self):
        self.signal, self.time = 0, 0.0

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        """The signal handler."""
        if self.signal and time.monotonic() - self.time > self.SAME_WISH:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
