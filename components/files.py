"""Files and directories that are complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from components.errors import SaveError
from config import UserError

MANIFEST = "manifest.json"


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


def write_atomic(path: Path, text: str) -> None:
    """Writes a small text file in one atomic step: a reader, or a crash, finds the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
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
        manifest = {path.relative_to(partial).as_posix(): file_digest(path) for path in files}
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


def verify_manifest(directory: Path, unread: set[str] = frozenset()) -> str | None:
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
        if file_digest(path) != expected:
            return f"{name} differs from its manifest"
    return None


def read_manifest(directory: Path) -> dict[str, dict]:
    """The size and checksum of every file that belongs to a directory. Raises OSError or ValueError."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{directory / MANIFEST}: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{directory / MANIFEST} holds no mapping")
    return manifest


def file_digest(path: Path) -> dict:
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
