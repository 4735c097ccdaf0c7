"""The state of a training run: what a checkpoint holds, and how a run resumes from it."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.checkpoint_manager import OPTIMIZER_STATE, OPTIMIZER_STATES_KEPT, latest_checkpoint, set_links
from components.distributed import Processes, check_shared_filesystem
from components.errors import reason
from components.export import describe, export, read_description
from components.files import MANIFEST, atomic_directory, read_manifest, saving, verify_manifest
from components.lora import check_frozen, frozen_checksum, merge_adapters, trainable_weights
from components.parallelize import full_tensors, tensor_from_rank0
from components.pretrained import Pretrained, read_tensors
from config import BATCH_KEYS, FREE_KEYS, REMEDIES, Config, UserError, read_yaml

TRAINING_STATE = "training_state.pt"


@dataclass
class TrainState:
    """Where a run is, besides weights, optimizer state and random states.

    run_id: the logger's id of the run, kept on resume; epoch: finished epochs; examples: finished ones of the current
    epoch; step: finished optimizer steps of the run; stage: that of the last step (-1: none); best_accuracy: that of
    stage best_stage, reached after best_epoch; metrics_bytes: size of metrics.jsonl.
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


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: Path,
    pretrained: Pretrained,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    description: dict,
    processes: Processes,
) -> None:
    """Save everything that an exact resume needs, atomically, and update best and last; called by every rank.

    description: the checkpoint's coconut.json. Raises SaveError on every rank if rank 0 cannot write.
    """
    if processes.run_on_rank0(lambda: verify_manifest(directory)) is not None:  # else saved before an interruption
        weights = full_tensors(unique_weights(pretrained.lm), processes)
        optimizer_state = full_tensors(optimizer_tensors(model, optimizer), processes)
        training = {"state": asdict(state)}
        training["random_states"] = processes.all_gather_object(random_state(processes.device))

        def write() -> None:
            """Write all files of the checkpoint; called on rank 0. Raises SaveError."""
            with saving(directory), atomic_directory(directory) as partial:
                if any(".lora_" in name for name in weights):  # model.safetensors has them merged, which rounds
                    training["weights"] = trainable_weights(pretrained.lm, weights)
                    training["frozen"] = frozen_checksum(pretrained.lm)
                export(pretrained.lm, partial, description, merge_adapters(pretrained.lm, weights))
                pretrained.tokenizer.save_pretrained(partial)
                torch.save(training, partial / TRAINING_STATE)
                save_file(optimizer_state, partial / OPTIMIZER_STATE)

        processes.run_on_rank0(write)

    def link() -> None:
        """Update best and last; called on rank 0. Raises SaveError."""
        with saving(directory):
            set_links(directory, state.best_epoch)

    processes.run_on_rank0(link)


def check_saving(pretrained: Pretrained, config: Config) -> None:
    """Raise UserError for a model or tokenizer that cannot be saved, which would show after an epoch."""
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:  # without room there, nothing is checked
        try:
            export(pretrained.lm, Path(folder), describe(config, pretrained.tokenizer, 0), weights={})
            pretrained.tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the libraries raise all kinds for settings that they refuse to write
            what = f"{pretrained.source}: the model can be loaded, but not saved"
            raise UserError(f"{what}: {reason(error)}") from error


def unique_weights(lm: nn.Module) -> dict[str, Tensor]:
    """Return a language model's state dict with each tied weight once."""
    own = {name for name, _ in lm.named_parameters()}
    tied = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - own
    return {name: value for name, value in lm.state_dict().items() if name not in tied}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return this rank's optimizer state as PARAMETER.KEY -> tensor, in the same order on every rank."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def random_state(device: torch.device) -> dict:
    """Return the states of this rank's random generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


# --- resuming ---------------------------------------------------------------------------------------------------------


def find_checkpoint(config: Config, processes: Processes) -> tuple[Path | None, Config]:
    """Return the checkpoint from which the same command resumes its run, None for a fresh start, and the run's config.

    Rank 0 decides for all. Raises UserError for a config that would train differently.
    """
    directory = config.run_directory
    checkpoint = processes.run_on_rank0(lambda: latest_checkpoint(directory))
    if checkpoint is None:
        return None, config
    check_shared_filesystem(checkpoint / MANIFEST, processes)
    # A key that the run did not know had its default.
    saved = Config().resolved() | read_yaml(directory / "config.yaml")
    if not config.lora_rank:
        config = with_origin(saved, config, processes)
    check_same_training(saved, config, checkpoint, processes)
    return checkpoint, config


def check_same_training(saved: dict, config: Config, checkpoint: Path, processes: Processes) -> None:
    """Raise UserError for keys that would alter the training that a checkpoint resumes.

    Micro-batch and accumulation may change with the world size while a step takes as many problems as before. If only
    the world size changes that number, it is a warning, or an error within an epoch whose order depends on it.
    """
    changed = {
        key: f"  - {key}: {saved[key]!r} there, {value!r} now"
        for key, value in config.resolved().items()
        if key not in FREE_KEYS and saved[key] != value
    }
    before = read_description(checkpoint).get("problems_per_step")
    now = config.problems_per_step(processes.world_size)
    if before == now:
        for key in BATCH_KEYS:
            changed.pop(key, None)
    elif before and config.group_by_length and "_step_" in checkpoint.name:
        changed["group_by_length"] = f"  - group_by_length ties the order to {before} problems per step, now {now}"
    if changed:
        raise UserError(
            f"{checkpoint.parent} holds a run that was trained differently:\n" + "\n".join(changed.values()) + "\n"
            "change them back to resume it, or choose another name for a new run"
        )
    if before not in (None, now):
        processes.print(f"warning: the effective batch was {before} problems so far, and is {now} from now on")


def with_origin(saved: dict, config: Config, processes: Processes) -> Config:
    """Return the config with the run's saved origin, which its own checkpoint supersedes.

    That is load_model_path, and model_id if its folder no longer exists.
    """
    model = Path(str(saved["model_id"]))
    keys = ["load_model_path", *(["model_id"] if model.is_absolute() and not model.exists() else [])]
    for key in keys:
        if getattr(config, key) != saved[key]:
            processes.print(
                f"note: {key}: {getattr(config, key)!r} is ignored: the run began from {saved[key]!r}, "
                "and resumes from its own checkpoint"
            )
    return Config(config.resolved() | {key: saved[key] for key in keys})


def load_training_state(
    checkpoint: Path, model: nn.Module, lm: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> TrainState:
    """Restore the optimizer state and this rank's random states, and with LoRA its weights; returns the TrainState.

    With another world size than the checkpoint's, all ranks keep the random states that they were seeded with.
    """
    training = processes.run_on_rank0(lambda: read_training_state(checkpoint))
    if "weights" in training:
        lm.load_state_dict(training["weights"], strict=False)
        processes.run_on_rank0(lambda: check_frozen(lm, training["frozen"], checkpoint))
    if processes.run_on_rank0(lambda: OPTIMIZER_STATE in read_manifest(checkpoint)):
        load_optimizer_state(checkpoint / OPTIMIZER_STATE, model, optimizer, processes)
    else:
        reason = f"{checkpoint} has no optimizer state (only the newest {OPTIMIZER_STATES_KEPT} do)"
        processes.print(f"warning: {reason}, so AdamW starts with a fresh one")
    states = training["random_states"]
    if len(states) == processes.world_size:
        torch.set_rng_state(states[processes.rank]["cpu"])
        if processes.device.type == "cuda" and states[processes.rank]["cuda"] is not None:
            torch.cuda.set_rng_state(states[processes.rank]["cuda"], processes.device)
    else:
        processes.print(f"{checkpoint}: saved by {len(states)} processes, so the random streams are seeded anew")
    return TrainState(**training["state"])


def load_optimizer_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Read an optimizer state on rank 0 and send every rank its part, tensor by tensor."""
    saved = load_file(path) if processes.is_rank0 else {}
    shapes = processes.run_on_rank0(lambda: {name: (value.shape, value.dtype) for name, value in saved.items()})
    parameters, state = dict(model.named_parameters()), {}
    for name, (shape, dtype) in shapes.items():
        owner, _, key = name.rpartition(".")
        parameter = parameters[owner]
        like = parameter.detach() if parameter.shape == shape else torch.empty(shape, dtype=dtype)
        value = saved.pop(name).clone() if processes.is_rank0 else None  # a copy, since the file may be deleted
        state.setdefault(parameter, {})[key] = tensor_from_rank0(value, like, processes)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbered = {number: state[parameter] for number, parameter in enumerate(order) if parameter in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def read_training_state(checkpoint: Path) -> dict:
    """Read the training_state.pt of a checkpoint. Raises UserError for one that this program did not write."""
    try:
        training = read_tensors(checkpoint / TRAINING_STATE)
        TrainState(**training["state"])
        len(training["random_states"])
    except (ValueError, TypeError, LookupError) as error:
        advice = "remove that checkpoint to resume from the one before"
        raise UserError(f"name: {str(checkpoint)!r} cannot be resumed: {error}; {advice}") from error
    return training


# --- evaluating, or starting from it ----------------------------------------------------------------------------------


def check_intact(config: Config, path: str | Path | None) -> None:
    """Raise UserError if the checkpoint that a run evaluates or starts from does not match its manifest.

    One without a manifest, which no run has saved, is loaded with a note.
    """
    key = "load_model_path" if path else "model_id"
    folder = Path(path or config.model_id)
    if path and not folder.exists():
        raise UserError(f"{key}: {str(path)!r} does not exist; {REMEDIES[key]}")
    if not config.verify or not folder.exists() or (config.from_scratch and not path):
        return  # a hub name, or no weights are read
    if not (folder / MANIFEST).exists():
        print(f"{key}: {folder} has no {MANIFEST}, so it is loaded unverified", flush=True)
    elif complaint := verify_manifest(folder, skip={TRAINING_STATE, OPTIMIZER_STATE}):
        advice = "copy it again, or use another one; verify: False loads it unchecked"
        raise UserError(f"{key}: {str(folder)!r} is damaged: {complaint}; {advice}")
