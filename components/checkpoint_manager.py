"""The checkpoints of a run on disk: the latest complete one, retention, the links best and last, disk space."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from components.export import read_description
from components.files import fsync, read_manifest, say_once, verify_manifest, write_atomic, write_manifest
from components.run_directory import CHECKPOINT, follow, set_aside
from config import Config, UserError

OPTIMIZER_STATE = "optimizer.safetensors"  # tensors PARAMETER.KEY, such as ...weight.exp_avg
OPTIMIZER_STATES_KEPT = 2  # of the newest checkpoints: if the newest is damaged, the one before resumes exactly


def list_checkpoints(run_directory: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    named = [(match, path) for path in run_directory.glob("checkpoint_*") if (match := CHECKPOINT.fullmatch(path.name))]
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
    linked, retained = {follow(newest.with_name(name)).resolve() for name in ("best", "last")}, []
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

    What else has these names, such as the folders of a copy that followed the links, is set aside.
    """
    paths = [last.with_name(name) for name in ("best", "last")]
    if names := [path.name for path in paths if path.exists() and not path.is_symlink() and follow(path) == path]:
        set_aside(last.parent, names)
    set_link("last", last)
    best = last.with_name(f"checkpoint_{best_epoch}")
    if best.is_dir():
        set_link("best", best)


def set_link(name: str, checkpoint: Path) -> None:
    """Point the relative link `name` beside a checkpoint to it, atomically; without links, a file has its name."""
    link = checkpoint.with_name(name)
    if follow(link).resolve() == checkpoint.resolve():
        return
    partial = checkpoint.with_name(name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(checkpoint.name)
    except OSError:  # many kinds, of cloud mounts and network shares
        write_atomic(partial, checkpoint.name + "\n")
        say_once("note: this file system has no links, so best and last are files with the name of a checkpoint")
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
