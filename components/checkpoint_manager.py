"""What of a run is on the disk: its complete checkpoints, which of them are kept, and the room that they need."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from components.files import MANIFEST, read_manifest, sync, verify_manifest, write_atomic
from components.moments import MOMENTS
from components.pretrained import read_description
from config import Config, UserError

OPTIMIZER_STATES_KEPT = (
    2  # of the newest checkpoints: if the newest is damaged, the run goes on exactly from the one before
)

NAME = re.compile(r"checkpoint_(\d+)(?:_step_(\d+))?")  # finished epochs; within an epoch, finished steps of the run


def checkpoints(run_directory: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    named = [(match, path) for path in run_directory.glob("checkpoint_*") if (match := NAME.fullmatch(path.name))]
    named.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)), reverse=True)
    return [path for _, path in named]


def latest_checkpoint(run_directory: Path) -> Path | None:
    """The newest complete checkpoint of a run; a damaged one is named and passed over. None where there is none."""
    for path in checkpoints(run_directory):
        if (complaint := verify_manifest(path)) is None:
            return path
        print(f"warning: {path} is damaged ({complaint}), so it is passed over", flush=True)
    if checkpoints(run_directory):
        print(f"warning: {run_directory} has no complete checkpoint left, so the run starts afresh", flush=True)
    return None


def remove_partial(run_directory: Path) -> None:
    """Removes what a save left behind that a crash cut short."""
    for path in run_directory.glob("*.partial"):
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def prune(newest: Path, keep: int | None, only_improved: bool) -> None:
    """Removes checkpoints that the `newest` makes superfluous; what best and last point to stays in any case.

    Those are all but the newest `keep` (None: none), those within an epoch but for the newest two, and with
    `only_improved` those that were no improvement. Of those that stay only the newest two keep the optimizer's state.
    Damaged ones ahead of the newest do not count.
    """
    linked, stay = {newest.with_name(name).resolve() for name in ("best", "last")}, []
    for age, path in enumerate(until(newest)):
        old = (keep is not None and age >= keep) or (age >= 2 and "_step_" in path.name)
        poor = only_improved and not improved(path)
        if (old or poor) and path.resolve() not in linked:
            shutil.rmtree(path, ignore_errors=True)
        else:
            stay.append(path)
    for path in stay[OPTIMIZER_STATES_KEPT:]:
        drop_optimizer_state(path)


def until(newest: Path) -> list[Path]:
    """A checkpoint and all of its run that are older, the newest first."""
    all_of_run = checkpoints(newest.parent)
    return all_of_run[all_of_run.index(newest) :]


def drop_optimizer_state(checkpoint: Path) -> None:
    """Removes the optimizer's state from a checkpoint, if the disk lets it.

    It stays complete: the manifest forgets the file before it is removed, and no other file is read.
    """
    if not (checkpoint / MOMENTS).exists():
        return
    with suppress(OSError, ValueError):  # ValueError: a damaged manifest
        manifest = read_manifest(checkpoint)
        if manifest.pop(MOMENTS, None):
            write_atomic(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            sync(checkpoint)
        (checkpoint / MOMENTS).unlink()


def improved(checkpoint: Path) -> bool:
    """Whether a checkpoint says that it was the best of its stage when it was saved."""
    try:
        return read_description(checkpoint).get("improved", False)
    except UserError:  # a damaged one
        return False


def set_links(last: Path, best_epoch: int) -> None:
    """Points last to a checkpoint, and best to that of the best epoch, where it is still there."""
    link("last", last)
    best = last.with_name(f"checkpoint_{best_epoch}")
    if best.is_dir():
        link("best", best)


def link(name: str, checkpoint: Path) -> None:
    """Points the relative link `name` (best, last) beside a checkpoint to it, in one atomic step."""
    if checkpoint.with_name(name).resolve() == checkpoint.resolve():
        return
    partial = checkpoint.with_name(name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(checkpoint.name)
    os.replace(partial, checkpoint.with_name(name))


def disk_needed(config: Config, directory: Path, epoch: int, weights: int, moments: int) -> int:
    """The bytes that the rest of a run takes at most, besides the checkpoints that are in its directory.

    epoch: finished epochs; weights, moments: bytes of the model and of the optimizer's state in a checkpoint.
    """
    there = checkpoints(directory)
    saved = config.num_epochs - epoch + (2 if config.save_every_steps else 0)
    if config.keep_checkpoints is not None:
        saved = min(saved, max(config.keep_checkpoints + 2 - len(there), 1))  # best, and one that is being written
    states = OPTIMIZER_STATES_KEPT + 1 - sum((path / MOMENTS).exists() for path in there)
    return saved * weights + min(saved, max(states, 1)) * moments


def disk_report(config: Config, directory: Path, epoch: int, weights: int, moments: int) -> str:
    """A line for the user about `disk_needed` and the room that there is; another one warns if that is less."""
    needed = disk_needed(config, directory, epoch, weights, moments)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    report = f"disk: checkpoints will take up to {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
    if needed <= free:
        return report
    return f"{report}\nwarning: {existing} may run out of room; make some, or set keep_checkpoints or another save_path"
