"""What a run saves and how it comes back: complete, verified directories and the links best and last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from curriculum import METHODS
from pretrained import DESCRIPTION, Pretrained
from utils import Config, Processes, UserError

STATE = "training_state.pt"
MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """Where a run stands, besides weights, optimizer and random streams.

    epoch: finished epochs; step: finished optimizer steps of the whole run; best_accuracy: of the stage best_stage;
    metrics_bytes: the size of metrics.jsonl; run_id: the logger's name for the run, kept when it is continued.
    """

    run_id: str
    epoch: int = 0
    step: int = 0
    best_accuracy: float = -1.0
    best_stage: int = -1
    metrics_bytes: int = 0


def save_checkpoint(
    directory: Path,
    pretrained: Pretrained,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    description: dict,
    processes: Processes,
) -> None:
    """Saves everything that the run needs to go on as if it had never stopped; every process calls it.

    The files are written beside their place and synced; a manifest with their sizes and checksums comes last, then the
    directory is renamed. So a directory that is there is complete, unless the disk fails.
    """
    random_states = processes.gather(random_state(processes.device))
    if processes.is_main:
        partial = directory.with_name(directory.name + ".partial")
        for leftover in (partial, directory):
            shutil.rmtree(leftover, ignore_errors=True)
        pretrained.lm.save_pretrained(partial)
        pretrained.tokenizer.save_pretrained(partial)
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        training = {
            "state": asdict(state),
            "optimizer": optimizer.state_dict(),
            "random_states": random_states,
        }
        torch.save(training, partial / STATE)
        manifest = {path.name: fingerprint(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        os.replace(partial, directory)
        sync(directory.parent)
    processes.barrier()


def describe(config: Config, stage: int, epoch: int, pretrained: Pretrained) -> dict:
    """What coconut.json says of a checkpoint: how to prompt the model, and which added tokens it has rows for."""
    ids = {token: pretrained.token_id(token) for token in METHODS[config.method].tokens}
    keys = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max")
    return {key: getattr(config, key) for key in keys} | {"stage": stage, "epoch": epoch, "token_ids": ids}


def random_state(device: torch.device) -> dict:
    """The state of this process's random streams."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def load_training_state(checkpoint: Path, optimizer: torch.optim.Optimizer, processes: Processes) -> TrainState:
    """Brings the optimizer and this process's random streams back, and returns where the run stands.

    With another number of processes than the checkpoint was written by, all streams stay as they were seeded.
    """
    training = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(training["optimizer"])
    streams = training["random_states"]
    if len(streams) == processes.world_size:
        torch.set_rng_state(streams[processes.rank]["cpu"])
        if processes.device.type == "cuda" and streams[processes.rank]["cuda"] is not None:
            torch.cuda.set_rng_state(streams[processes.rank]["cuda"], processes.device)
    else:
        processes.print(f"{checkpoint}: written by {len(streams)} processes, so random streams are seeded afresh")
    return TrainState(**training["state"])


def latest_checkpoint(run_directory: Path) -> Path | None:
    """The newest complete checkpoint of a run; a damaged one is named and passed over. None where there is none."""
    numbered = [(int(m[1]), path) for path in run_directory.glob("checkpoint_*") if (m := NAME.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        if (complaint := damage(path)) is None:
            return path
        print(f"warning: {path} is damaged ({complaint}), so an earlier checkpoint is used", flush=True)
    return None


NAME = re.compile(r"checkpoint_(\d+)")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, measured against its manifest, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if fingerprint(path) != expected:
            return f"{name} differs from its manifest"
    return None


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


def link(name: str, checkpoint: Path) -> None:
    """Points the relative link `name` (best, last) beside a checkpoint to it, in one atomic step."""
    partial = checkpoint.with_name(name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(checkpoint.name)
    os.replace(partial, checkpoint.with_name(name))


# Keys that a continued run may change: none of them alters what is trained.
FREE_KEYS = {
    "project",
    "name",
    "save_path",
    "only_eval",
    "debug",
    "logger",
    "num_epochs",
    "resume",
    "val_path",
}
FREE_KEYS |= {"batch_size_eval", "max_new_tokens", "save_only_improve", "trust_remote_code"}


def check_same_training(saved: dict, config: Config, run_directory: Path) -> None:
    """Raises UserError for keys of the config that would alter the training that a run directory holds."""
    changed = [
        f"  - {key}: {saved[key]!r} there, {value!r} now"
        for key, value in config.resolved().items()
        if key in saved and key not in FREE_KEYS and saved[key] != value
    ]
    if changed:
        raise UserError(
            f"{run_directory} holds a run that was trained differently:\n" + "\n".join(changed) + "\n"
            "set them back to continue it, or choose another name for a new run"
        )
