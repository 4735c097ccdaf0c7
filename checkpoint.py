"""What a run saves and how it comes back: complete, verified directories and the links best and last."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from coconut import Coconut
from config import Config, UserError
from curriculum import METHODS
from lora import check_frozen, frozen_checksum, merged, trained_weights
from parallel import Processes, collect_state, spread_optimizer_state
from pretrained import DESCRIPTION, Pretrained, read_description
from utils import damage, saving, whole_directory

STATE = "training_state.pt"


@dataclass
class TrainState:
    """Where a run stands, besides weights, optimizer and random streams.

    run_id: the logger's name for the run, kept when it is continued; epoch: finished epochs; examples: those done of
    the epoch in progress; step: finished optimizer steps of the whole run; stage: that of the last step (-1: none);
    best_accuracy: that of the stage best_stage, reached after best_epoch; metrics_bytes: the size of metrics.jsonl.
    """

    run_id: str
    epoch: int = 0
    examples: int = 0
    step: int = 0
    stage: int = -1
    best_accuracy: float = -1.0
    best_stage: int = -1
    best_epoch: int = 0
    metrics_bytes: int = 0


def save_checkpoint(
    directory: Path,
    pretrained: Pretrained,
    model: Coconut,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    description: dict,
    processes: Processes,
) -> None:
    """Saves everything that the run needs to go on as if it had never stopped; every process calls it.

    The files are written beside their place and synced; a manifest with their sizes and checksums comes last, then the
    directory is renamed. So a directory that is there is complete, unless the disk fails. Raises SaveError in every
    process if the main one cannot write.
    """
    weights, optimizer_state = collect_state(model, optimizer)
    weights = lm_weights(pretrained.lm, weights)
    random_states = processes.gather(random_state(processes.device))
    training = {"state": asdict(state), "optimizer": optimizer_state, "random_states": random_states}
    if any(".lora_" in name for name in weights):  # the model's file holds them merged, which rounds
        training["weights"] = trained_weights(pretrained.lm, weights)
        training["frozen"] = frozen_checksum(pretrained.lm)

    def write() -> None:
        with saving(directory):
            write_checkpoint(directory, pretrained, weights, description, training)
            set_links(directory, state.best_epoch)

    processes.on_main(write)


def write_checkpoint(directory: Path, pretrained: Pretrained, weights: dict, description: dict, training: dict) -> None:
    """Writes a checkpoint, unless it is there."""
    if damage(directory) is None:
        return  # a run that was stopped before it went on from there
    with whole_directory(directory) as partial:
        write_files(partial, pretrained, weights, description, training)


def write_files(partial: Path, pretrained: Pretrained, weights: dict, description: dict, training: dict) -> None:
    """Writes the files of a checkpoint into a new directory."""
    pretrained.lm.save_pretrained(partial, state_dict=merged(pretrained.lm, weights))
    pretrained.tokenizer.save_pretrained(partial)
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    torch.save(training, partial / STATE)


def lm_weights(lm: torch.nn.Module, weights: dict) -> dict:
    """The Coconut module's weights under the language model's own names, each tied one once."""
    own = {name for name, _ in lm.named_parameters()}
    tied = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - own
    named = {name.removeprefix("base_causallm."): value for name, value in weights.items()}
    return {name: value for name, value in named.items() if name not in tied}


def problems_per_step(config: Config, processes: Processes) -> int:
    """The number of problems in an optimizer step, over all processes."""
    return config.batch_size_training * config.gradient_accumulation_steps * processes.world_size


def describe(config: Config, state: TrainState, pretrained: Pretrained, improved: bool) -> dict:
    """What coconut.json says of a checkpoint: how to prompt the model, and which added tokens it has rows for."""
    ids = {token: pretrained.token_id(token) for token in METHODS[config.method].tokens}
    keys = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max")
    return {key: getattr(config, key) for key in keys} | {
        "stage": state.stage,
        "epoch": state.epoch,
        "improved": improved,
        "token_ids": ids,
    }


def random_state(device: torch.device) -> dict:
    """The state of this process's random streams."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def load_training_state(
    checkpoint: Path, model: Coconut, optimizer: torch.optim.Optimizer, processes: Processes
) -> TrainState:
    """Brings the optimizer and this process's random streams back, and returns where the run stands.

    With another number of processes than the checkpoint was written by, all streams stay as they were seeded.
    """
    training = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    if "weights" in training:
        processes.on_main(lambda: check_frozen(model.base_causallm, training.get("frozen"), checkpoint))
        model.base_causallm.load_state_dict(training["weights"], strict=False)  # all others are frozen
    spread_optimizer_state(model, optimizer, training["optimizer"])
    streams = training["random_states"]
    if len(streams) == processes.world_size:
        torch.set_rng_state(streams[processes.rank]["cpu"])
        if processes.device.type == "cuda" and streams[processes.rank]["cuda"] is not None:
            torch.cuda.set_rng_state(streams[processes.rank]["cuda"], processes.device)
    else:
        processes.print(f"{checkpoint}: written by {len(streams)} processes, so random streams are seeded afresh")
    return TrainState(**training["state"])


NAME = re.compile(r"checkpoint_(\d+)(?:_step_(\d+))?")  # finished epochs; within an epoch, finished steps of the run


def checkpoints(run_directory: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    named = [(match, path) for path in run_directory.glob("checkpoint_*") if (match := NAME.fullmatch(path.name))]
    named.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)), reverse=True)
    return [path for _, path in named]


def latest_checkpoint(run_directory: Path) -> Path | None:
    """The newest complete checkpoint of a run; a damaged one is named and passed over. None where there is none."""
    for path in checkpoints(run_directory):
        if (complaint := damage(path)) is None:
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
    `only_improved` those that were no improvement. Damaged ones ahead of the newest do not count.
    """
    linked, all_of_run = {newest.with_name(name).resolve() for name in ("best", "last")}, checkpoints(newest.parent)
    for age, path in enumerate(all_of_run[all_of_run.index(newest) :]):
        old = (keep is not None and age >= keep) or (age >= 2 and "_step_" in path.name)
        poor = only_improved and not improved(path)
        if (old or poor) and path.resolve() not in linked:
            shutil.rmtree(path, ignore_errors=True)


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
FREE_KEYS |= {"batch_size_eval", "max_new_tokens", "save_only_improve", "save_every_steps", "keep_checkpoints"}
FREE_KEYS |= {"parallel", "compile", "gradient_checkpointing", "trust_remote_code", "data_cache", "data_workers"}


def check_same_training(saved: dict, config: Config, checkpoint: Path, processes: Processes) -> None:
    """Raises UserError for keys of the config that would alter the training that a run's checkpoint continues.

    Batch and accumulation may change with the number of processes while a step takes as many problems as before. With
    other processes alone it takes another number, which is worth a warning, or an error within an epoch whose order
    depends on it.
    """
    saved = Config().resolved() | saved  # a key that is newer than the run had its default there
    changed = {
        key: f"  - {key}: {saved[key]!r} there, {value!r} now"
        for key, value in config.resolved().items()
        if key not in FREE_KEYS and saved[key] != value
    }
    before = read_description(str(checkpoint)).get("problems_per_step")
    now = problems_per_step(config, processes)
    if before == now:
        changed.pop("batch_size_training", None)
        changed.pop("gradient_accumulation_steps", None)
    elif before and config.group_by_length and "_step_" in checkpoint.name:
        changed["group_by_length"] = f"  - group_by_length ties the order to {before} problems for each step, now {now}"
    elif before:
        processes.print(f"warning: an optimizer step took {before} problems so far, and takes {now} from now on")
    if changed:
        raise UserError(
            f"{checkpoint.parent} holds a run that was trained differently:\n" + "\n".join(changed.values()) + "\n"
            "set them back to continue it, or choose another name for a new run"
        )
