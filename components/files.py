"""Files and directories that are complete or absent: atomic writes, and manifests with sizes and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from components.errors import SaveError
from config import UserError

MANIFEST = "manifest.json"


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn whatever fails while `path` is written (a full, read-only or failing disk) into a SaveError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # not OSError alone: libraries raise errors of their own for a full disk
        advice = "earlier checkpoints are intact; free some space, and the same command resumes the run"
        raise SaveError(f"{path} could not be written: {error}; {advice}") from error


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file atomically: a reader, or a crash, sees the old text or the new one."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # other processes may write the same file
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `directory` once the block has filled it.

    A manifest is written last, everything is fsynced, then the directory is renamed. So a directory that exists is
    complete, unless the disk fails. If the block raises, nothing is left behind.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a crash
    try:
        make_private(partial.parent)
        partial.mkdir(mode=0o700)
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        write_manifest(partial, {path.relative_to(partial).as_posix(): file_digest(path) for path in files})
        for path in (*partial.rglob("*"), partial):
            fsync(path)
        shutil.rmtree(directory, ignore_errors=True)  # a damaged one
        os.replace(partial, directory)
        fsync(directory.parent)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
        raise


def make_private(directory: Path) -> None:
    """Create a directory and its missing parents with mode 0700; existing ones keep their mode."""
    for path in (*reversed(directory.parents), directory):
        path.mkdir(mode=0o700, exist_ok=True)


def verify_manifest(directory: Path, skip: set[str] = frozenset()) -> str | None:
    """Check a directory's files, except those to skip, against its manifest; return what is wrong, or None."""
    try:
        manifest = read_manifest(directory)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest.items():
        if name in skip:
            continue
        path = directory / name
        if not os.path.isfile(path):  # False, not an error, for a name that no file can have
            return f"{name} is missing"
        if file_digest(path) != expected:
            return f"{name} differs from its manifest"
    return None


def read_manifest(directory: Path) -> dict[str, dict]:
    """Return the size and checksum of each file of a directory. Raises OSError or ValueError."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{directory / MANIFEST} is not a mapping")
    return manifest


def write_manifest(directory: Path, manifest: dict[str, dict]) -> None:
    """Write the manifest of a directory atomically."""
    write_atomic(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def file_digest(path: Path) -> dict:
    """Return the size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fsync(path: Path) -> None:
    """Wait until a file or directory is on the disk; a file system that cannot sync directories is used as it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS):
            raise
        say_once("note: this file system cannot sync directories, so a power failure may cost the newest checkpoint")
    finally:
        os.close(descriptor)


@cache
def say_once(text: str) -> None:
    """Print a note that is the same each time, once."""
    print(text, flush=True)
