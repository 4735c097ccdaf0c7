"""The directory of a run: its claim, its latest complete checkpoint, retention, the links best and last, disk space."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

from components.export import read_description
from components.files import fsync, make_private, read_manifest, saving, verify_manifest, write_manifest
from config import Config, UserError

OPTIMIZER_STATE = "optimizer.safetensors"  # tensors PARAMETER.KEY, such as ...weight.exp_avg
OPTIMIZER_STATES_KEPT = 2  # of the newest checkpoints: if the newest is damaged, the one before resumes exactly
NAME = re.compile(r"checkpoint_(\d+)(?:_step_(\d+))?")  # finished epochs; within an epoch, finished steps of the run
METRICS, CONFIG = "metrics.jsonl", "config.yaml"
FILES = re.compile(rf"{METRICS}|{CONFIG}|predictions_\d+\.jsonl")
FOLDERS = re.compile(rf"{NAME.pattern}|tensorboard|wandb")
REMEDY = "change its permissions, or choose another name or save_path"


# --- the claim of a directory -----------------------------------------------------------------------------------------


class Claim:
    """The claim of a run's directory by rank 0 of one start, from before anything there is read to the end of the run.

    The lock is on metrics.jsonl, which is truncated but never replaced. Where there is none yet, `create` takes it, so
    that a start that is refused before it trains leaves nothing behind.
    """

    def __init__(self, directory: Path):
        self.directory, self.file = directory, None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()  # which unlocks it

    def acquire(self) -> None:
        """Check that the run can use its directory, and lock it. Raises UserError if it cannot."""
        check_writable(self.directory)
        check_types(self.directory)
        if (self.directory / METRICS).exists():
            self.lock()

    def create(self) -> None:
        """Create the directory and lock it, unless `acquire` has. Raises UserError if another run was faster."""
        if self.file is not None:
            return
        with saving(self.directory):
            make_private(self.directory)
        self.lock()
        if (self.directory / METRICS).stat().st_size:
            raise UserError(
                f"name: another process has trained in {self.directory} since this one started; "
                "start again to resume that run, or choose another name"
            )

    def lock(self) -> None:
        """Lock metrics.jsonl. Raises UserError if another process holds the lock."""
        try:
            self.file = open(self.directory / METRICS, "ab")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"name: {error.filename} cannot be written: {error.strerror}; {REMEDY}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait until it ends, stop it, or choose another name"
            raise UserError(f"name: another process is training in {self.directory}; {remedy}") from error
        except OSError:
            pass  # a file system without locks


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
        if (match := NAME.fullmatch(path.name)) and not path.is_dir():
            raise UserError(
                f"name: {path} is a file, as the official code saves them, but a run's checkpoints are folders; choose "
                f"another name; to start from the file, set load_model_path={path} resume={match[1]}"
            )
        expected = path.is_file if FILES.fullmatch(path.name) else path.is_dir if FOLDERS.fullmatch(path.name) else None
        if expected and not expected():
            kind = "file" if expected == path.is_file else "folder"
            raise UserError(f"name: {path} should be a {kind}, but is none; move it, or choose another name")


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


# --- checkpoints ------------------------------------------------------------------------------------------------------


def list_checkpoints(run_directory: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    named = [(match, path) for path in run_directory.glob("checkpoint_*") if (match := NAME.fullmatch(path.name))]
    named.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)), reverse=True)
    return [path for _, path in named]


def latest_checkpoint(run_directory: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None. Damaged ones are skipped with a warning."""
    checkpoints = list_checkpoints(run_directory)
    for path in checkpoints:
        if (complaint := verify_manifest(path)) is None:
            return path
        print(f"warning: skipping damaged checkpoint {path}: {complaint}", flush=True)
    if checkpoints:
        print(f"warning: {run_directory} has no complete checkpoint left; training starts from scratch", flush=True)
    return None


def remove_partial(run_directory: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in run_directory.glob("*.partial"):
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def prune(newest: Path, keep: int | None, only_improved: bool) -> None:
    """Apply the retention rules after `newest` was saved; what best and last point to always stays.

    Removed are all but the newest `keep` checkpoints (None: keep all), those within an epoch but for the newest two,
    and, with only_improved, those that did not improve accuracy. Of the rest only the newest two keep their optimizer
    state. Damaged checkpoints newer than `newest` do not count.
    """
    linked, retained = {newest.with_name(name).resolve() for name in ("best", "last")}, []
    checkpoints = list_checkpoints(newest.parent)
    for age, path in enumerate(checkpoints[checkpoints.index(newest) :]):
        expired = (keep is not None and age >= keep) or (age >= 2 and "_step_" in path.name)
        if (expired or (only_improved and not improved(path))) and path.resolve() not in linked:
            shutil.rmtree(path, ignore_errors=True)
        else:
            retained.append(path)
    for path in retained[OPTIMIZER_STATES_KEPT:]:
        drop_optimizer_state(path)


def drop_optimizer_state(checkpoint: Path) -> None:
    """Delete the optimizer state of a checkpoint, if the disk allows it.

    The manifest drops the file before it is deleted, so the checkpoint is complete at every moment.
    """
    if not (checkpoint / OPTIMIZER_STATE).exists():
        return
    with suppress(OSError, ValueError):  # ValueError: a damaged manifest
        manifest = read_manifest(checkpoint)
        if manifest.pop(OPTIMIZER_STATE, None):
            write_manifest(checkpoint, manifest)
            fsync(checkpoint)
        (checkpoint / OPTIMIZER_STATE).unlink()


def improved(checkpoint: Path) -> bool:
    """Return whether a checkpoint was the best of its stage when it was saved."""
    try:
        return read_description(checkpoint).get("improved", False)
    except UserError:  # damaged
        return False


def set_links(last: Path, best_epoch: int) -> None:
    """Point `last` to a checkpoint, and `best` to that of the best epoch if it exists.

    Folders of these names, which a copy has that followed the links, are set aside.
    """
    paths = [last.with_name(name) for name in ("best", "last")]
    if names := [path.name for path in paths if path.exists() and not path.is_symlink()]:
        set_aside(last.parent, names)
    set_link("last", last)
    best = last.with_name(f"checkpoint_{best_epoch}")
    if best.is_dir():
        set_link("best", best)


def set_link(name: str, checkpoint: Path) -> None:
    """Point the relative link `name` beside a checkpoint to it, atomically."""
    link = checkpoint.with_name(name)
    if link.resolve() == checkpoint.resolve():
        return
    partial = checkpoint.with_name(name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(checkpoint.name)
    os.replace(partial, link)


def disk_needed(config: Config, run_directory: Path, epoch: int, weights: int, optimizer_state: int) -> int:
    """Return the bytes that the rest of a run needs at most, besides the checkpoints that exist.

    epoch: finished epochs; weights, optimizer_state: their bytes in one checkpoint.
    """
    existing = list_checkpoints(run_directory)
    saves = config.num_epochs - epoch + (2 if config.save_every_steps else 0)
    if config.keep_checkpoints is not None:
        saves = min(saves, max(config.keep_checkpoints + 2 - len(existing), 1))  # + best, + the one being written
    states = OPTIMIZER_STATES_KEPT + 1 - sum((path / OPTIMIZER_STATE).exists() for path in existing)
    return saves * weights + min(saves, max(states, 1)) * optimizer_state


def disk_report(config: Config, run_directory: Path, epoch: int, weights: int, optimizer_state: int) -> str:
    """Compare `disk_needed` with the free space; returns a line for the user, and a warning if it is not enough."""
    needed = disk_needed(config, run_directory, epoch, weights, optimizer_state)
    existing = next(path for path in (run_directory, *run_directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    report = f"disk: checkpoints will take up to {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
    if needed <= free:
        return report
    return f"{report}\nwarning: {existing} may run out of space; free some, or set keep_checkpoints or save_path"
