"""What a run saves of itself, and how it comes back and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from coconut import Coconut
from components.checkpoint_manager import OPTIMIZER_STATES_KEPT, set_links
from components.distributed import Processes
from components.export import export
from components.files import MANIFEST, atomic_directory, read_manifest, saving, verify_manifest
from components.lora import check_frozen, frozen_checksum, merge_adapters, rows_of_tables, trained_weights
from components.moments import MOMENTS, TensorFile, load_moments, named_moments, write_tensors
from components.pretrained import Pretrained, read_description, read_tensors
from components.spread import while_collecting
from config import FREE_KEYS, Config, UserError
from curriculum import ALL_STEPS, METHODS, num_placeholders

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
    weights, moments = lm_weights(pretrained.lm), named_moments(model, optimizer)
    training = {"state": asdict(state), "random_states": processes.gather(random_state(processes.device))}

    def write(collected: Iterator[Tensor]) -> None:
        with saving(directory), atomic_directory(directory) as partial:
            write_files(partial, pretrained, {name: next(collected) for name in weights}, description, training)
            write_tensors(partial / MOMENTS, moments, collected)

    if (
        processes.run_on_rank0(lambda: verify_manifest(directory)) is not None
    ):  # or a run was stopped before it went on from there
        while_collecting([*weights.values(), *moments.values()], write, processes)
    processes.run_on_rank0(lambda: link_saved(directory, state.best_epoch))


def link_saved(directory: Path, best_epoch: int) -> None:
    """`set_links`, as a part of saving."""
    with saving(directory):
        set_links(directory, best_epoch)


def write_files(partial: Path, pretrained: Pretrained, weights: dict, description: dict, training: dict) -> None:
    """Writes the files of a checkpoint, but for the optimizer's state, into a new directory."""
    if any(".lora_" in name for name in weights):  # the model's file holds them merged, which rounds
        training["weights"] = trained_weights(pretrained.lm, weights)
        training["frozen"] = frozen_checksum(pretrained.lm)
    export(pretrained.lm, partial, description, merge_adapters(pretrained.lm, weights))
    pretrained.tokenizer.save_pretrained(partial)
    torch.save(training, partial / STATE)


def lm_weights(lm: torch.nn.Module) -> dict[str, Tensor]:
    """This process's part of the language model's weights, each tied one once."""
    own = {name for name, _ in lm.named_parameters()}
    tied = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - own
    return {name: value for name, value in lm.state_dict().items() if name not in tied}


def problems_per_step(config: Config, processes: Processes) -> int:
    """The number of problems in an optimizer step, over all processes."""
    return config.batch_size_training * config.gradient_accumulation_steps * processes.world_size


def describe(config: Config, state: TrainState, pretrained: Pretrained, improved: bool) -> dict:
    """What coconut.json says of a checkpoint: how to prompt the model, and which added tokens it has rows for.

    thoughts (pauses) are those of a problem with as many steps as there are stages.
    """
    ids = {token: pretrained.token_id(token) for token in METHODS[config.method].tokens}
    keys = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max")
    return {key: getattr(config, key) for key in keys} | {
        "stage": state.stage,
        "thoughts": num_placeholders(state.stage, ALL_STEPS, config, training=False),
        "max_new_tokens": config.answer_limit,
        "epoch": state.epoch,
        "improved": improved,
        "token_ids": ids,
        "eos_token_id": pretrained.tokenizer.eos_token_id,
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
    training = processes.run_on_rank0(lambda: read_state(checkpoint))
    if "weights" in training:
        load_adapters(training, model.base_causallm, checkpoint, processes)
    saved = open_moments(checkpoint, model) if processes.is_rank0 else None
    if processes.run_on_rank0(lambda: saved is None):
        kept = f"(only the newest {OPTIMIZER_STATES_KEPT} do)"
        processes.print(f"warning: {checkpoint} keeps no optimizer state {kept}, so AdamW's moments start afresh")
    else:
        load_moments(saved, model, optimizer, processes)
    streams = training["random_states"]
    if len(streams) == processes.world_size:
        torch.set_rng_state(streams[processes.rank]["cpu"])
        if processes.device.type == "cuda" and streams[processes.rank]["cuda"] is not None:
            torch.cuda.set_rng_state(streams[processes.rank]["cuda"], processes.device)
    else:
        processes.print(f"{checkpoint}: written by {len(streams)} processes, so random streams are seeded afresh")
    return TrainState(**training["state"])


def load_adapters(training: dict, lm: torch.nn.Module, checkpoint: Path, processes: Processes) -> None:
    """Brings back what `lora_rank` trains; an earlier version kept the frozen weights too, in place of a checksum."""
    frozen = processes.run_on_rank0(lambda: training.get("frozen") or frozen_checksum(lm))
    lm.load_state_dict(rows_of_tables(lm, training["weights"]), strict=False)
    processes.run_on_rank0(lambda: check_frozen(lm, frozen, checkpoint))


def read_state(checkpoint: Path) -> dict:
    """The training state of a checkpoint without the optimizer's, which an earlier version kept in the same file."""
    training = read_training(checkpoint)
    return {key: value for key, value in training.items() if key != "optimizer"}


def read_training(checkpoint: Path) -> dict:
    """The training_state.pt of a checkpoint, its tensors mapped. Raises UserError for one that we did not write."""
    advice = "remove that checkpoint to go on from the one before"
    try:
        training = read_tensors(checkpoint / STATE, mmap=True)
        TrainState(**training["state"])
        len(training["random_states"])
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"name: {str(checkpoint)!r} cannot be continued: {error}; {advice}") from error
    return training


def open_moments(checkpoint: Path, model: Coconut) -> TensorFile | dict | None:
    """The optimizer's state in a checkpoint, PARAMETER.KEY -> tensor, none of it read yet; None if it has none."""
    if MOMENTS in read_manifest(checkpoint):
        return TensorFile(checkpoint / MOMENTS)
    training = read_training(checkpoint)
    if "optimizer" not in training:
        return None
    states = training["optimizer"]["state"].items()
    named = {f"{name}.{key}": value for name, state in states for key, value in state.items()}
    return rows_of_tables(model, named)


def check_intact(config: Config, path: str | Path | None) -> None:
    """Raises UserError where a checkpoint that is evaluated or started from is not as its manifest says.

    What has no manifest, since it was not saved by a run, is taken with a word.
    """
    key = "load_model_path" if path else "model_id"
    where = Path(path or config.model_id)
    if not config.verify or not where.exists() or (config.from_scratch and not path):
        return  # a hub name, or no weights
    if not (where / MANIFEST).exists():
        print(f"{key}: {where} has no {MANIFEST}, so it is taken as it is", flush=True)
    elif complaint := verify_manifest(where, unread={STATE, MOMENTS}):
        advice = "copy it anew, or take another one; verify: False takes it as it is"
        raise UserError(f"{key}: {str(where)!r} is damaged ({complaint}); {advice}")


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
        for key in ("batch_size_training", "gradient_accumulation_steps", "global_batch_size"):
            changed.pop(key, None)
    elif before and config.group_by_length and "_step_" in checkpoint.name:
        changed["group_by_length"] = f"  - group_by_length ties the order to {before} problems for each step, now {now}"
    elif before:
        processes.print(f"warning: an optimizer step took {before} problems so far, and takes {now} from now on")
    if changed:
        raise UserError(
            f"{checkpoint.parent} holds a run that was trained differently:\n" + "\n".join(changed.values()) + "\n"
            "set them back to continue it, or choose another name for a new run"
        )
