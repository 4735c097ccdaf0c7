"""The training loop: epochs, optimizer steps, and what is saved after them."""

from __future__ import annotations

import math
import platform
import secrets
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from tqdm import tqdm

from build import Run, inputs
from components.checkpoint import TrainState, describe, load_training_state, problems_per_step, save_checkpoint
from components.checkpoint_manager import disk_report, prune, remove_partial, set_links
from components.distributed import Processes, check_shared_filesystem
from components.errors import Interrupted
from components.files import make_private, saving, write_atomic
from components.lora import parameter_groups
from components.metrics import MetricLogger
from components.parallelize import choose, distribute, is_sharded, reshard, sync_gradients, zero_grad
from curriculum import schedule_table, stage_of
from dataset import Lengths, epoch_order, get_cot_latent_dataset, step_batches
from evaluate import Evaluation, validate, write_predictions

SHOWN = 8  # training sequences and predictions that wandb or tensorboard show as texts


class NotFiniteError(Exception):
    """The loss or the gradient is not a finite number."""


@dataclass(frozen=True)
class Work:
    """An optimizer step to come: the supervised tokens and all tokens of all processes, the passes of one at most."""

    supervised: float
    tokens: float
    passes: int


@dataclass(frozen=True)
class Agreed:
    """What all processes know of a step: its loss and gradient norm, a signal or 0, and the work that comes next."""

    loss: float
    norm: float
    signal: int
    work: Work


class Trainer:
    """A run in training: its model as shared among the processes, its optimizer, where it stands, and its log."""

    def __init__(self, run: Run):
        self.run = run
        if run.config.compile:
            run.model.compile()
        if run.config.gradient_checkpointing:
            run.model.recompute(run.config.gradient_checkpointing)
        strategy, run.keep_weights = choose(run.model, run.config, largest_batches(run), run.processes)
        self.model = distribute(run.model, strategy, run.config.bf16, run.keep_weights, run.processes)
        self.new_optimizer()
        self.state = self.restore()
        self.log = MetricLogger(None, run.config, "")

    def new_optimizer(self) -> None:
        """Starts with a fresh AdamW over all parameters that are trained."""
        config = self.run.config
        groups = parameter_groups(self.run.pretrained.lm, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)  # measured on a CPU: five times as fast

    def restore(self) -> TrainState:
        """Where the run starts: after the checkpoint it goes on from, else at the epoch that `resume` names."""
        run, processes = self.run, self.run.processes
        if run.checkpoint is None:
            return TrainState(processes.gather(secrets.token_hex(4))[0], epoch=run.config.resume)
        if run.config.resume:
            processes.print("resume is ignored: the run's directory holds a checkpoint to continue from")
        state = load_training_state(run.checkpoint, run.model, self.optimizer, processes)
        if processes.is_rank0:  # the run may have died before it set the links, or a newer checkpoint is damaged
            set_links(run.checkpoint, state.best_epoch)
        processes.print(f"continuing {run.directory} after epoch {state.epoch}, step {state.step}")
        return state

    def fit(self) -> None:
        """Trains epoch after epoch, with validation and a checkpoint after each."""
        run, config, state = self.run, self.run.config, self.state
        run.processes.run_on_rank0(self.open_log)
        try:
            if not config.debug:
                check_shared_filesystem(run.directory / "config.yaml", run.processes)
            for epoch in range(state.epoch, config.num_epochs):
                self.train_epoch(epoch)
                self.end_epoch(epoch, validate(run, state.stage))
            run.processes.run_on_rank0(self.log.flush)
        except Interrupted:
            self.save()
            run.processes.print("stopped by a signal; the same command continues this run")
            raise
        finally:
            self.log.close()

    def open_log(self) -> None:
        """Opens the log where the checkpoint left off, in the run's directory with its config.yaml."""
        run = self.run
        if run.config.debug:
            return
        with saving(run.directory):
            make_private(run.directory)
        self.log = MetricLogger(run.directory, run.config, self.state.run_id, self.state.metrics_bytes, self.state.step)
        with saving(run.directory):
            remove_partial(run.directory)
            # With the run's id no other folder has the same text, which tells whether all nodes see this one.
            write_atomic(run.directory / "config.yaml", f"{resolved_text(run)}# run {self.state.run_id}\n")

    def train_epoch(self, epoch: int) -> None:
        """The optimizer steps of an epoch, or those that are left of it."""
        run, config, state = self.run, self.run.config, self.state
        run.model.train()
        steps = steps_left(run, epoch, state.examples)
        made = run.ahead(lambda step: make_batches(run, epoch, step), steps)
        step = next(made, None)
        agreed = self.agree(None, step)
        progress = tqdm(steps, unit="step", disable=not run.processes.is_rank0)
        started = time.perf_counter()
        for _ in progress:
            self.enter_stage(epoch)
            progress.set_description(f"epoch {epoch + 1}/{config.num_epochs} stage {state.stage}", refresh=False)
            count, batches = step
            loss, work = self.backward(batches, agreed.work), agreed.work
            step = next(made, None)  # a GPU computes meanwhile
            agreed = self.agree(loss, step)
            lr = self.update(agreed, batches, f"epoch {epoch + 1}, step {state.step + 1}")
            state.step, state.examples = state.step + 1, state.examples + count
            speed = work.tokens / (time.perf_counter() - started)
            progress.set_postfix_str(f"loss {agreed.loss:.4f}, {speed:.0f} tokens/s")
            metrics = {"epoch": epoch + 1, "step": state.step, "stage": state.stage, "loss": agreed.loss}
            metrics |= {"grad_norm": agreed.norm, "lr": lr, "tokens_per_second": speed}
            self.log.write({f"train/{name}": value for name, value in metrics.items()}, state.step)
            if agreed.signal:
                raise Interrupted(agreed.signal)
            left = state.examples < len(run.train_examples)
            if config.save_every_steps and state.step % config.save_every_steps == 0 and left:
                self.save()
            started = time.perf_counter()

    def enter_stage(self, epoch: int) -> None:
        """Sets the stage of the next step, with a fresh optimizer where reset_optimizer asks for one."""
        config, state = self.run.config, self.state
        stage = stage_within(self.run, epoch, state.examples)
        switched, entered, state.stage = state.stage not in (-1, stage), state.stage != stage, stage
        if entered and self.log.backend:
            self.log.show("train/sequences", first_sequences(self.run, stage, epoch), state.step)
        if (config.reset_optimizer is True and switched) or (
            config.reset_optimizer == "every_epoch" and state.examples == 0
        ):
            self.new_optimizer()

    def backward(self, batches: list[dict], work: Work) -> Tensor:
        """The forward and backward passes of an optimizer step; returns this process's share of the loss, a scalar.

        The loss is the sum over all supervised tokens of all batches of all processes, divided by their number, so any
        division of the same problems makes the same step.
        """
        total = torch.zeros((), device=self.run.processes.device)
        for number, batch in enumerate(batches, 1):
            with sync_gradients(self.model, last=number == len(batches)):
                with self.run.autocast():
                    loss = self.model(**self.equal_passes(inputs(batch), work.passes)).loss
                loss = loss * (len(batch["plan"].targets) / work.supervised)
                (loss * self.run.processes.world_size).backward()  # gradients are averaged over processes
            total += loss.detach()
        reshard(self.model)
        return total

    def agree(self, loss: Tensor | None, step: tuple[int, list[dict]] | None) -> Agreed:
        """What all processes must know of the step that they have computed (None: none yet) and of the next one.

        This is the one small reduction of a step, and the one time that it waits for a GPU.
        """
        processes, batches = self.run.processes, step[1] if step else []
        supervised = sum(len(batch["plan"].targets) for batch in batches)
        tokens = sum(batch["attention_mask"].sum().item() for batch in batches if batch["idx"][0] >= 0)
        passes = max((1 + len(batch["plan"].cuts) for batch in batches), default=0)
        done = torch.zeros(2, device=processes.device) if loss is None else torch.stack([loss, self.gradient_norm()])
        losses, norms, signals, *works = processes.table(done, [self.run.stop.signal, supervised, tokens, passes])
        norm = math.hypot(*norms) if is_sharded(self.model) else norms[0]
        if not math.isfinite(sum(norms)):  # one device alone may miscalculate
            norm = sum(norms)
        work = Work(sum(works[0]), sum(works[1]), int(max(works[2])))
        return Agreed(sum(losses), norm, int(max(signals)), work)

    def gradient_norm(self) -> Tensor:
        """The norm of the gradient, or of this process's shards of it, a scalar."""
        return torch.nn.utils.get_total_norm(self.gradients())

    def gradients(self) -> list[Tensor]:
        """This process's gradients, or its shards of them."""
        gradients = [p.grad for p in self.run.model.parameters() if p.grad is not None]
        return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]

    def update(self, agreed: Agreed, batches: list[dict], place: str) -> float:
        """Takes the optimizer step and frees the gradients; returns the learning rate.

        Raises NotFiniteError in all processes before the weights change.
        """
        config = self.run.config
        if not math.isfinite(agreed.loss + agreed.norm):
            idx = self.run.processes.gather([i for batch in batches for i in batch["idx"].tolist() if i >= 0])
            found = f"loss {agreed.loss}, gradient norm {agreed.norm}, on the training problems {idx}"
            raise NotFiniteError(f"{place}: {found}")
        if config.max_grad_norm is not None and agreed.norm > config.max_grad_norm:
            for gradient in self.gradients():
                gradient.mul_(config.max_grad_norm / agreed.norm)
        lr = config.lr * min(1, (self.state.step + 1) / max(config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        zero_grad(self.model)  # now, so that validation has the room
        return lr

    def equal_passes(self, batch: dict[str, Tensor], most: int) -> dict:
        """The batch with as many passes as any process needs, padded where it has fewer columns than that.

        Where sharded weights are gathered anew for every pass, all processes must make equally many.
        """
        if not is_sharded(self.model) or self.run.keep_weights:
            return batch
        pad = self.run.pretrained.tokenizer.pad_token_id
        padding = {"input_ids": pad, "attention_mask": 0, "position_ids": 0, "labels": -100}
        missing = max(most - batch["input_ids"].shape[1], 0)
        padded = {key: F.pad(batch[key], (0, missing), value=value) for key, value in padding.items()}
        return {**padded, "plan": batch["plan"], "min_passes": most}

    def end_epoch(self, epoch: int, evaluation: Evaluation) -> None:
        """Writes down a finished epoch: its metrics, predictions and checkpoint, and the links best and last."""
        run, config, state = self.run, self.run.config, self.state
        state.epoch, state.examples = epoch + 1, 0
        self.log.write({"eval/epoch": state.epoch, "eval/stage": state.stage, **evaluation.metrics()}, state.step)
        self.log.show("eval/predictions", evaluation.predictions[:SHOWN], state.step)
        # Early stages still write steps and score higher, so the best starts afresh at every stage.
        improved = state.stage != state.best_stage or evaluation.accuracy > state.best_accuracy
        if improved:
            state.best_stage, state.best_accuracy, state.best_epoch = state.stage, evaluation.accuracy, state.epoch
        if not config.debug:
            path = run.directory / f"predictions_{state.epoch}.jsonl"
            run.processes.run_on_rank0(lambda: write_predictions(evaluation.predictions, path))
        self.save(best=improved)

    def save(self, best: bool = False) -> None:
        """Saves a checkpoint of the present state, and removes those that need not be kept."""
        run, state = self.run, self.state
        if run.config.debug:
            return
        state.metrics_bytes = run.processes.run_on_rank0(self.log.flush)
        name = f"checkpoint_{state.epoch}" + (f"_step_{state.step}" if state.examples else "")
        description = describe(run.config, state, run.pretrained, improved=best)
        description["problems_per_step"] = problems_per_step(run.config, run.processes)
        checkpoint = run.directory / name
        save_checkpoint(checkpoint, run.pretrained, run.model, self.optimizer, state, description, run.processes)
        if run.processes.is_rank0:
            prune(checkpoint, run.config.keep_checkpoints, run.config.save_only_improve)
            print(f"saved {checkpoint}" + (", the best of this stage so far" if best else ""), flush=True)

    def disk_report(self) -> str:
        """What the checkpoints to come need of the disk, and what it has."""
        weights = sum(4 * p.numel() for p in self.run.model.parameters())  # float32 in the file
        moments = sum(2 * p.nbytes for group in self.optimizer.param_groups for p in group["params"])
        return disk_report(self.run.config, self.run.directory, self.state.epoch, weights, moments)


def train(run: Run) -> None:
    """Trains a run to its end; a finished run is left as it is."""
    trainer = Trainer(run)
    if trainer.state.epoch >= run.config.num_epochs:
        run.processes.print(f"{run.directory} is trained for {trainer.state.epoch} epochs; raise num_epochs to go on")
        return
    run.processes.print(resolved_text(run) + "\n" + schedule_table(run.config))
    if not run.config.debug:
        run.processes.print(trainer.disk_report())
    trainer.fit()


@dataclass(frozen=True)
class Step:
    """An optimizer step to come: its number of problems, its stage, and the problems of each of this process's passes.

    filler: a problem for a pass that has none.
    """

    count: int
    stage: int
    passes: list[list[int]]
    filler: int


def steps_left(run: Run, epoch: int, done: int) -> list[Step]:
    """The optimizer steps of an epoch that are left when so many of its problems are done."""
    config, processes, steps = run.config, run.processes, []
    order = epoch_order(run.train_examples, config, epoch, problems_per_step(config, processes))
    shape = (config.batch_size_training, config.gradient_accumulation_steps, processes.rank, processes.world_size)
    for count, passes in step_batches(order[done:], *shape):
        steps.append(Step(count, stage_within(run, epoch, done), passes, filler=order[0]))
        done += count
    return steps


def largest_batches(run: Run) -> list[dict[str, int]]:
    """The shape of a batch at each stage: rows, most columns, and the most thoughts and supervised tokens of a row."""
    lengths, config = Lengths(run.train_examples), run.config
    stages = {stage_of(epoch, config) for epoch in range(run.config.num_epochs)}
    return [{"rows": config.batch_size_training, **lengths.most(stage, config)} for stage in sorted(stages)]


def first_sequences(run: Run, stage: int, epoch: int) -> list[dict]:
    """The first training sequences of a stage as texts: whole, and what is supervised of them."""
    sequences = run.sequences(get_cot_latent_dataset, stage, run.train_examples, epoch=epoch)
    items, decode = sequences.__getitems__(range(min(SHOWN, len(sequences)))), run.pretrained.tokenizer.decode
    supervised = [[label for label in item["labels"] if label != -100] for item in items]
    return [
        {"stage": stage, "sequence": decode(item["input_ids"]), "supervised": decode(labels)}
        for item, labels in zip(items, supervised, strict=True)
    ]


def stage_within(run: Run, epoch: int, done: int) -> int:
    """The stage that is trained when so many problems of an epoch are done."""
    return stage_of(epoch + done / len(run.train_examples), run.config)


def make_batches(run: Run, epoch: int, step: Step) -> tuple[int, list[dict[str, Tensor]]]:
    """The number of problems of a step, and the batches of this process's passes.

    A pass for which no problem is left has a batch that counts for nothing (its idx is -1).
    """
    sequences, batches = run.sequences(get_cot_latent_dataset, step.stage, run.train_examples, epoch=epoch), []
    for indices in step.passes:
        features = sequences.__getitems__(indices or [step.filler])
        if not indices:
            features = [{**feature, "labels": [-100] * len(feature["labels"]), "idx": -1} for feature in features]
        batches.append(run.collate(features))
    return step.count, batches


def resolved_text(run: Run) -> str:
    """The resolved config as YAML, with the versions and devices that a result depends on as comments."""
    names = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    names |= {"commit": git_commit(), "device": devices(run.processes)}
    comments = "".join(f"# {name} {version}\n" for name, version in names.items())
    return comments + yaml.safe_dump(run.config.resolved(), sort_keys=False)


def devices(processes: Processes) -> str:
    """How many processes compute, and on what; all have the main one's kind of device."""
    name = f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})"
    if processes.device.type == "cuda":
        name = torch.cuda.get_device_name(processes.device)
    return f"{processes.world_size} x {name}"


def git_commit() -> str:
    """The commit of this code, as far as it can be told."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:  # git is not installed
        return "unknown"
