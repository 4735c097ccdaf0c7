"""Trains or evaluates one experiment.

torchrun --nnodes 1 --nproc_per_node N run.py CONFIG.yaml [key=value ...]
python run.py CONFIG.yaml [key=value ...]         (one process, on a GPU or on the CPU)
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import secrets
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import (
    TrainState,
    check_same_training,
    describe,
    latest_checkpoint,
    link,
    load_training_state,
    save_checkpoint,
)
from coconut import Coconut
from curriculum import END, LATENT, METHODS, PAUSE, START, schedule_table, stage_of
from dataset import (
    MyCollator,
    check_lengths,
    get_cot_latent_dataset,
    get_question_latent_dataset,
    read_problems,
    step_batches,
    tokenize_problems,
)
from evaluate import Evaluation, autocast, evaluate, show_examples, to_device, write_predictions
from pretrained import Pretrained, load_pretrained
from utils import (
    Config,
    MetricLogger,
    Processes,
    UserError,
    load_config,
    read_yaml,
    set_seed,
    start_processes,
    stop_processes,
)

EXIT_USER_ERROR, EXIT_NOT_FINITE = 2, 3
DEBUG_TRAIN, DEBUG_VALID = 5000, 32  # problems in a debug run


class NotFiniteError(Exception):
    """The loss or the gradient is not a finite number."""


@dataclass
class Run:
    """What the parts of a run share; `checkpoint` is the one that the run goes on from."""

    config: Config
    processes: Processes
    pretrained: Pretrained
    model: Coconut
    collator: MyCollator
    train_examples: list[dict]
    valid_problems: list[dict]
    valid_examples: list[dict]
    checkpoint: Path | None

    @property
    def directory(self) -> Path:
        """Where the run's files are."""
        return Path(self.config.save_path) / self.config.name

    def sequences(self, make, stage: int, examples: list[dict], **options):
        """A data set of `make` (get_cot_latent_dataset or get_question_latent_dataset) for the run's method."""
        method = METHODS[self.config.method]
        placeholder = PAUSE if method.placeholder == "pause" else LATENT
        ids = (self.pretrained.token_id(token) for token in (START, placeholder, END))
        return make(stage, examples, self.config, *ids, no_special_marker=not method.markers, **options)


def main(words: list[str] | None = None) -> int:
    """The program: parses the command line, runs, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as args/gsm_coconut.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to set on top of the file")
    arguments = parser.parse_args(words)
    try:
        config = load_config(arguments.config, arguments.overrides)
        processes = start_processes()
        run = build(config, processes)
        test(run) if config.only_eval else train(run)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_FINITE
    finally:
        stop_processes()
    return 0


def build(config: Config, processes: Processes) -> Run:
    """Reads the data and loads the model; whatever is wrong with them is found here, before anything is written."""
    train_size, valid_size = (DEBUG_TRAIN, DEBUG_VALID) if config.debug else (None, None)
    train_problems = [] if config.only_eval else read_problems(config.train_path, train_size)
    valid_problems = read_problems(config.val_path, valid_size)
    checkpoint = find_checkpoint(config)
    set_seed(config.seed)  # the same random weights everywhere
    pretrained = load_pretrained(config, checkpoint or config.load_model_path)
    set_seed(config.seed, processes.rank)  # dropout masks of its own for every process
    train_examples = tokenize_problems(train_problems, pretrained.tokenizer)
    valid_examples = tokenize_problems(valid_problems, pretrained.tokenizer)
    if limit := getattr(pretrained.lm.config, "max_position_embeddings", None):
        stages = {stage_of(epoch, config) for epoch in range(config.num_epochs)}
        check_lengths(train_examples, stages, config, limit, config.train_path)
        check_lengths(valid_examples, stages, config, limit, config.val_path, mix_stages=False)
    model = pretrained.coconut().to(processes.device)
    collator = MyCollator(pretrained.tokenizer, model.latent_token_id)
    return Run(
        config,
        processes,
        pretrained,
        model,
        collator,
        train_examples,
        valid_problems,
        valid_examples,
        checkpoint,
    )


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint from which the same command, given again, continues its run. None for a fresh start."""
    directory = Path(config.save_path) / config.name
    checkpoint = None if config.debug or config.only_eval else latest_checkpoint(directory)
    if checkpoint is not None:
        check_same_training(read_yaml(str(directory / "config.yaml")), config, directory)
    return checkpoint


def test(run: Run) -> None:
    """only_eval: tests the loaded model at its stage and writes to save_path/name/eval_CHECKPOINT."""
    config, checkpoint = run.config, Path(run.config.load_model_path)
    stage = stage_of(config.resume, config) if config.resume else run.pretrained.description.get("stage", 0)
    run.processes.print(f"evaluating {checkpoint} on {config.val_path} at stage {stage}")
    evaluation = validate(run, stage)
    if run.processes.is_main and not config.debug:
        directory = run.directory / f"eval_{checkpoint.resolve().name}"
        directory.mkdir(parents=True, exist_ok=True)
        path = unused(directory / f"predictions_{Path(config.val_path).stem}.jsonl")
        write_predictions(evaluation.predictions, path)
        summary = {
            "checkpoint": str(checkpoint),
            "val_path": config.val_path,
            "stage": stage,
            **evaluation.metrics(),
        }
        path.with_name(path.stem.replace("predictions", "metrics") + ".yaml").write_text(yaml.safe_dump(summary))
        print(f"predictions and metrics: {path.parent}")


def unused(path: Path) -> Path:
    """The path, or the first of path_2, path_3, ... that does not exist: nothing is overwritten."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_stem(f"{path.stem}_{number}"), number + 1
    return candidate


def validate(run: Run, stage: int) -> Evaluation:
    """Validates the run's model at a stage, and prints the result with a few examples."""
    sequences = run.sequences(get_cot_latent_dataset, stage, run.valid_examples, mix_stages=False)
    prompts = run.sequences(get_question_latent_dataset, stage, run.valid_examples)
    evaluation = evaluate(
        run.model,
        sequences,
        prompts,
        run.valid_problems,
        run.collator,
        run.pretrained.tokenizer,
        run.config,
        run.processes,
    )
    cot = "" if evaluation.cot_match is None else f", CoT match {evaluation.cot_match:.1%}"
    run.processes.print(
        f"validation: accuracy {evaluation.accuracy:.1%}{cot}, loss {evaluation.loss:.4f}, "
        f"{evaluation.new_tokens:.1f} tokens and {evaluation.seconds:.4f} s per problem\n"
        + show_examples(evaluation.predictions)
    )
    return evaluation


def train(run: Run) -> None:
    """Trains epoch after epoch, with validation and a checkpoint after each; continues what the directory holds."""
    config, processes = run.config, run.processes
    optimizer = make_optimizer(run)
    state = restore(run, optimizer)
    if state.epoch >= config.num_epochs:
        processes.print(f"{run.directory}: already trained for {state.epoch} epochs; raise num_epochs to go on")
        return
    processes.print(schedule_table(config))
    logger = start_logger(run, state)
    model = run.model
    if processes.world_size > 1:
        model = DistributedDataParallel(model)
    try:
        for epoch in range(state.epoch, config.num_epochs):
            stage = stage_of(epoch, config)
            switched = epoch > 0 and stage != stage_of(epoch - 1, config)
            if config.reset_optimizer == "every_epoch" or (config.reset_optimizer and switched):
                optimizer = make_optimizer(run)
            train_epoch(run, model, optimizer, epoch, state, logger)
            evaluation = validate(run, stage)
            state.epoch = epoch + 1
            logger.log({"eval/epoch": state.epoch, "eval/stage": stage, **evaluation.metrics()}, state.step)
            save(run, optimizer, state, stage, evaluation, logger)
    finally:
        logger.close()


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """A fresh AdamW over all parameters."""
    config = run.config
    fused = run.processes.device.type == "cuda"
    return torch.optim.AdamW(run.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def restore(run: Run, optimizer: torch.optim.Optimizer) -> TrainState:
    """Where the run starts: after the checkpoint it goes on from, else at the epoch that `resume` names."""
    config, processes = run.config, run.processes
    if run.checkpoint is None:
        return TrainState(processes.gather(secrets.token_hex(4))[0], epoch=config.resume)
    if config.resume:
        processes.print("resume is ignored: the run's directory holds a checkpoint to continue from")
    state = load_training_state(run.checkpoint, optimizer, processes)
    processes.print(f"continuing {run.directory} after epoch {state.epoch}")
    return state


def start_logger(run: Run, state: TrainState) -> MetricLogger:
    """Makes the run's directory with its config.yaml and opens its log; other processes and debug runs log nowhere."""
    if not run.processes.is_main or run.config.debug:
        return MetricLogger(None, run.config, state.run_id)
    run.directory.mkdir(parents=True, exist_ok=True)
    text = "".join(f"# {line}\n" for line in versions()) + yaml.safe_dump(run.config.resolved(), sort_keys=False)
    (run.directory / "config.yaml").write_text(text, encoding="utf-8")
    return MetricLogger(run.directory, run.config, state.run_id, state.metrics_bytes)


def versions() -> list[str]:
    """The versions that a result depends on."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    names = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return [f"{name} {version}" for name, version in {**names, "commit": commit}.items()]


def train_epoch(run: Run, model, optimizer, epoch: int, state: TrainState, logger: MetricLogger) -> None:
    """One epoch of optimizer steps. `model` is the run's model, or its data-parallel wrapper."""
    config, processes = run.config, run.processes
    stage = stage_of(epoch, config)
    dataset = run.sequences(get_cot_latent_dataset, stage, run.train_examples, shuffle=True, epoch=epoch)
    shape = (
        config.batch_size_training,
        config.gradient_accumulation_steps,
        processes.rank,
        processes.world_size,
    )
    steps = step_batches(len(dataset), *shape)
    model.train()
    title = f"epoch {epoch + 1}/{config.num_epochs} stage {stage}"
    progress = tqdm(steps, desc=title, unit="step", disable=not processes.is_main)
    for passes in progress:
        started = time.perf_counter()
        batches = [run.collator([dataset[i] for i in indices or [0]]) for indices in passes]
        idle = [not indices for indices in passes]
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (state.step + 1) / max(config.warmup_steps, 1))
        loss, norm, tokens = train_step(
            run, model, optimizer, batches, idle, f"epoch {epoch + 1}, step {state.step + 1}"
        )
        state.step += 1
        speed = tokens / (time.perf_counter() - started)
        progress.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} tokens/s")
        metrics = {"epoch": epoch + 1, "step": state.step, "stage": stage, "loss": loss, "grad_norm": norm}
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "tokens_per_second": speed}
        logger.log({f"train/{name}": value for name, value in metrics.items()}, state.step)


def train_step(run: Run, model, optimizer, batches: list[dict], idle: list[bool], place: str) -> tuple:
    """One optimizer step over this process's batches: the loss is the sum over all supervised tokens of all batches of
    all processes, divided by their number, so any division of the same problems gives the same step.

    An idle batch stands in for a process with nothing left to do and counts for nothing. Returns the loss, the
    gradient's norm and the number of real tokens. Raises NotFiniteError before the weights change.
    """
    config, processes = run.config, run.processes
    counts = [0 if skip else (b["labels"][:, 1:] != -100).sum().item() for b, skip in zip(batches, idle, strict=True)]
    tokens = sum(b["attention_mask"].sum().item() for b, skip in zip(batches, idle, strict=True) if not skip)
    [supervised, tokens] = processes.sum([sum(counts), tokens])
    total = torch.zeros((), device=processes.device)
    optimizer.zero_grad(set_to_none=True)
    for number, (batch, count) in enumerate(zip(batches, counts, strict=True), 1):
        inputs = to_device({key: value for key, value in batch.items() if key != "idx"}, processes)
        last = number == len(batches)
        with nullcontext() if last or processes.world_size == 1 else model.no_sync():
            with autocast(config, processes):
                loss = model(**inputs).loss * (count / supervised)
            (loss * processes.world_size).backward()  # the wrapper averages over processes
        total += loss.detach()
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    [loss] = processes.sum([total.item()])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        idx = sorted(i for part in processes.gather([b["idx"].tolist() for b in batches]) for row in part for i in row)
        raise NotFiniteError(f"{place}: loss {loss}, gradient norm {norm}, on the training problems {idx}")
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    optimizer.step()
    return loss, norm.item(), tokens


def save(run: Run, optimizer, state: TrainState, stage: int, evaluation: Evaluation, logger: MetricLogger) -> None:
    """After an epoch: the predictions, the checkpoint, and the links best and last."""
    config, processes = run.config, run.processes
    if config.debug:
        return
    # Early stages still write steps and score higher, so the best starts afresh at every stage.
    improved = stage != state.best_stage or evaluation.accuracy > state.best_accuracy
    if improved:
        state.best_stage, state.best_accuracy = stage, evaluation.accuracy
    if processes.is_main:
        write_predictions(evaluation.predictions, run.directory / f"predictions_{state.epoch}.jsonl")
    if config.save_only_improve and not improved:
        return
    state.metrics_bytes = logger.flush()
    checkpoint = run.directory / f"checkpoint_{state.epoch}"
    description = describe(config, stage, state.epoch, run.pretrained)
    save_checkpoint(checkpoint, run.pretrained, optimizer, state, description, processes)
    if processes.is_main:
        for name in ("best", "last") if improved else ("last",):
            link(name, checkpoint)
        processes.print(f"saved {checkpoint}" + (", the best of this stage so far" if improved else ""))


if __name__ == "__main__":
    sys.exit(main())
