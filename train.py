"""The Trainer: epochs, optimizer steps, and what is saved after them."""

from __future__ import annotations

import math
import platform
import secrets
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from coconut import Coconut
from components.checkpoint import TrainState, load_training_state, save_checkpoint
from components.checkpoint_manager import disk_report, prune, remove_partial, set_links
from components.data_sources import content_digest
from components.display import Display, devices
from components.distributed import Processes, check_shared_filesystem
from components.errors import Interrupted, NotFiniteError
from components.export import describe, read_description
from components.files import saving, write_atomic
from components.lora import parameter_groups
from components.metrics import MetricLogger
from components.parallelize import choose_strategy, is_sharded, parallelize, reshard, sync_gradients, zero_grad
from components.pretrained import Pretrained
from components.run_directory import Claim, set_aside_earlier
from config import Config, UserError
from curriculum import stage_of
from dataset import (
    PlanningCollator,
    epoch_order,
    get_cot_latent_dataset,
    model_args,
    prefetch_batches,
    step_batches,
    to_device,
)
from evaluate import Evaluation, Validator, write_predictions
from utils import StopRequest

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 8  # training sequences and predictions that wandb or tensorboard show as texts


@dataclass(frozen=True)
class StepSpec:
    """The examples of an optimizer step: how many over all ranks, their stage, and this rank's micro-batches.

    filler: an example for micro-batches that have none, whose loss does not count.
    """

    count: int
    stage: int
    micro_batches: list[list[int]]
    filler: int


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know of a computed optimizer step and of the next one.

    loss, norm: of the computed step; signal: one that a rank received, or 0; supervised, tokens: the numbers of
    supervised and of all real tokens of the next step, over all ranks.
    """

    loss: float
    norm: float
    signal: int
    supervised: float
    tokens: float


class Trainer:
    """Trains a model: its parallelized module, its optimizer, where the run is, and its log.

    Args:
        model: the Coconut module around pretrained.lm, with weights on rank 0, on the meta device elsewhere.
        data: the tokenized training problems.
        validator: runs after every epoch.
        checkpoint: what the run resumes from, None for a fresh start; later the newest one.
    """

    def __init__(
        self,
        model: Coconut,
        pretrained: Pretrained,
        data: Dataset,
        validator: Validator,
        config: Config,
        processes: Processes,
        stop: StopRequest,
        checkpoint: Path | None,
    ):
        self.model, self.pretrained, self.data, self.validator = model, pretrained, data, validator
        self.config, self.processes, self.stop, self.checkpoint = config, processes, stop, checkpoint
        self.directory = config.run_directory
        self.collate = PlanningCollator(pretrained.tokenizer, model.latent_token_id)
        if config.compile:
            processes.print("compile: the first steps take minutes")
            model.compile()
        if config.gradient_checkpointing:
            model.checkpoint_activations(config.gradient_checkpointing)
        strategy = choose_strategy(model, config, processes)
        self.parallel_model = parallelize(model, model.blocks, strategy, config.bf16, processes)
        self.new_optimizer()
        self.data_facts = {} if config.debug else processes.run_on_rank0(self.describe_data)
        self.state = self.restore()
        self.log, self.display = MetricLogger(None, config, ""), Display(config, processes)

    def new_optimizer(self) -> None:
        """Start with a fresh AdamW over all trainable parameters."""
        groups = parameter_groups(self.pretrained.lm, self.config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, fused=True)  # five times as fast on a CPU

    def restore(self) -> TrainState:
        """Return where the run starts: after its checkpoint, or at the epoch that `resume` names."""
        if self.checkpoint is None:
            run_id = self.processes.all_gather_object(secrets.token_hex(4))[0]
            return TrainState(run_id, epoch=self.config.resume)
        if self.config.resume:
            self.processes.print("resume is ignored: the run's directory has a checkpoint to resume from")
        state = load_training_state(self.checkpoint, self.model, self.pretrained.lm, self.optimizer, self.processes)
        if self.valid_data_changed():
            self.processes.print(f"note: {self.config.val_path} or eval_max_problems has changed, so best starts anew")
            state.best_stage, state.best_accuracy = -1, -1.0
        self.processes.print(f"resuming {self.directory} after epoch {state.epoch}, step {state.step}")
        return state

    def describe_data(self) -> dict:
        """Return what a checkpoint remembers of the data: a change between two starts would go unnoticed."""
        digests = {f"{key}_sha256": content_digest(getattr(self.config, key)) for key in ("train_path", "val_path")}
        return {"train_problems": len(self.data), "val_problems": len(self.validator.problems), **digests}

    def valid_data_changed(self) -> bool:
        """Whether the validation problems differ from the checkpoint's. Raises UserError if the training ones do."""
        before = self.processes.run_on_rank0(lambda: read_description(self.checkpoint))
        train, valid, valid_size = (
            before.get(name, self.data_facts[name]) != self.data_facts[name]  # older checkpoints do not say
            for name in ("train_path_sha256", "val_path_sha256", "val_problems")
        )
        if train:
            raise UserError(
                f"train_path: {self.config.train_path!r} has changed since {self.checkpoint} was saved: it had "
                f"{before.get('train_problems')} problems, and has {len(self.data)} with another content now; restore "
                "it to resume, or choose another name for a new run"
            )
        return valid or valid_size

    # --- epochs -------------------------------------------------------------------------------------------------------

    def fit(self, claim: Claim) -> None:
        """Train epoch after epoch, with validation and a checkpoint after each; a finished run is left as it is.

        claim: that of the run's directory.
        """
        config, state, processes = self.config, self.state, self.processes
        if self.checkpoint is not None and processes.is_rank0:
            set_links(self.checkpoint, state.best_epoch)  # the run may have died before, or a newer one is damaged
        if state.epoch >= config.num_epochs:
            processes.print(f"{self.directory} has finished {state.epoch} epochs; raise num_epochs to train on")
            return
        self.introduce()
        processes.run_on_rank0(lambda: self.open_log(claim))
        try:
            if not config.debug:
                check_shared_filesystem(self.directory / "config.yaml", processes)
            for epoch in range(state.epoch, config.num_epochs):
                self.train_epoch(epoch)
                validated = (epoch + 1) % config.eval_every_epochs == 0 or epoch + 1 == config.num_epochs
                self.end_epoch(epoch, self.validator.validate(state.stage) if validated else None)
            processes.run_on_rank0(self.log.flush)
            if not config.debug:
                self.display.finish(state.best_accuracy)
        except Interrupted:
            self.save()
            processes.print("stopped by a signal" + ("" if config.debug else "; the same command resumes this run"))
            raise
        finally:
            self.display.end_steps()  # an error's message begins a line
            self.log.close()

    def introduce(self) -> None:
        """Print what is trained, and how much disk space it takes; with config.verbose the whole config."""
        if self.config.verbose:
            self.processes.print(self.config_text())
        self.display.header(self.pretrained.lm, len(self.data), len(self.validator.problems))
        if not self.config.debug:
            sizes = self.checkpoint_bytes()
            self.processes.print(disk_report(self.config, self.directory, self.state.epoch, *sizes))

    def open_log(self, claim: Claim) -> None:
        """Create the run's directory with its config.yaml and open the log where the checkpoint left off."""
        if self.config.debug:
            return
        claim.create(self.directory)
        with saving(self.directory):
            set_aside_earlier(self.directory, fresh=self.checkpoint is None)
        state = self.state
        self.log = MetricLogger(self.directory, self.config, state.run_id, state.metrics_bytes, state.step)
        with saving(self.directory):
            remove_partial(self.directory)
            # The run id makes the text unique, which `check_shared_filesystem` relies on.
            write_atomic(self.directory / "config.yaml", f"{self.config_text()}# run {state.run_id}\n")

    def train_epoch(self, epoch: int) -> None:
        """Take the optimizer steps of an epoch, or those that are left of it."""
        config, state = self.config, self.state
        self.model.train()
        specs = self.remaining_steps(epoch, state.examples)
        prepared = prefetch_batches(lambda spec: self.make_batches(epoch, spec), specs, config, self.processes)
        batches = next(prepared, [])
        totals = self.all_gather_totals(None, batches)
        total = math.ceil(len(self.data) / config.problems_per_step(self.processes.world_size))
        self.display.start_epoch(epoch, total - len(specs), total)
        started = time.perf_counter()
        for spec in specs:
            self.enter_stage(spec.stage, epoch)
            loss, tokens, computed = self.backward(batches, totals.supervised), totals.tokens, batches
            batches = next(prepared, [])  # while a GPU computes
            totals = self.all_gather_totals(loss, batches)
            lr = self.optimizer_step(totals, computed, f"epoch {epoch + 1}, step {state.step + 1}")
            state.step, state.examples = state.step + 1, state.examples + spec.count
            seconds = time.perf_counter() - started
            self.display.step(state.stage, totals.loss, tokens, seconds)
            metrics = {"epoch": epoch + 1, "step": state.step, "stage": state.stage, "loss": totals.loss}
            metrics |= {"grad_norm": totals.norm, "lr": lr, "tokens_per_second": tokens / seconds}
            self.log.write({f"train/{name}": value for name, value in metrics.items()}, state.step)
            if totals.signal:
                raise Interrupted(totals.signal)
            unfinished = state.examples < len(self.data)
            if config.save_every_steps and state.step % config.save_every_steps == 0 and unfinished:
                self.save()
                self.processes.print(f"saved {self.checkpoint}")
            started = time.perf_counter()
        self.display.end_steps()

    def enter_stage(self, stage: int, epoch: int) -> None:
        """Set the stage of the next step, with a fresh optimizer if reset_optimizer asks for one."""
        config, state = self.config, self.state
        entered, state.stage = state.stage != stage, stage
        if entered and self.log.backend:
            self.log.show("train/sequences", self.first_sequences(stage, epoch), state.step)
        if (config.reset_optimizer is True and entered) or (
            config.reset_optimizer == "every_epoch" and state.examples == 0
        ):
            self.new_optimizer()

    def end_epoch(self, epoch: int, evaluation: Evaluation | None) -> None:
        """Record a finished epoch: its metrics, predictions and checkpoint, and the links best and last.

        evaluation: None for an epoch that was not validated, which cannot be the best.
        """
        state = self.state
        state.epoch, state.examples = epoch + 1, 0
        improved = evaluation is not None and self.record(evaluation)
        self.save(best=improved)
        saved = f"checkpoint_{state.epoch}" + (f", best of stage {state.stage}" if improved else "")
        metrics = evaluation.metrics() if evaluation else {}
        self.display.end_epoch(state.stage, metrics, "" if self.config.debug else saved)

    def record(self, evaluation: Evaluation) -> bool:
        """Log a validation and write its predictions; returns whether it is the best of its stage."""
        state = self.state
        self.log.write({"eval/epoch": state.epoch, "eval/stage": state.stage, **evaluation.metrics()}, state.step)
        self.log.show("eval/predictions", evaluation.predictions[:SHOWN], state.step)
        # Early stages still write steps and score higher, so the best starts anew at every stage.
        improved = state.stage != state.best_stage or evaluation.accuracy > state.best_accuracy
        if improved:
            state.best_stage, state.best_accuracy, state.best_epoch = state.stage, evaluation.accuracy, state.epoch
        if not self.config.debug:
            path = self.directory / f"predictions_{state.epoch}.jsonl"
            self.processes.run_on_rank0(lambda: write_predictions(evaluation.predictions, path))
        return improved

    # --- an optimizer step --------------------------------------------------------------------------------------------

    def backward(self, batches: list[dict], supervised: float) -> Tensor:
        """Run the forward and backward passes of an optimizer step; returns this rank's share of the loss, a scalar.

        The loss is the sum over all supervised tokens of all micro-batches of all ranks, divided by their number, so
        any division of the same problems makes the same step.
        """
        total = torch.zeros((), device=self.processes.device)
        for number, batch in enumerate(batches, 1):
            with sync_gradients(self.parallel_model, last=number == len(batches)):
                with self.validator.autocast():
                    loss = self.parallel_model(**to_device(model_args(batch), self.processes.device)).loss
                loss = loss * (len(batch["plan"].targets) / supervised)
                (loss * self.processes.world_size).backward()  # gradients are averaged over ranks
            total += loss.detach()
        reshard(self.parallel_model)
        return total

    def all_gather_totals(self, loss: Tensor | None, batches: list[dict]) -> StepTotals:
        """Gather what all ranks must know: the loss and gradient norm of this step, and the tokens of the next one.

        The one small collective of a step, and the one time that it waits for a GPU. loss: None before the first step.
        """
        zero = torch.zeros((), device=self.processes.device)
        gathered = self.processes.all_gather_scalars(
            {
                "loss": zero if loss is None else loss,
                "norm": zero if loss is None else torch.nn.utils.get_total_norm(self.local_gradients()),
                "signal": self.stop.signal,
                "supervised": sum(len(batch["plan"].targets) for batch in batches),
                "tokens": sum(batch["attention_mask"].sum().item() for batch in batches if batch["idx"][0] >= 0),
            }
        )
        norms = gathered["norm"]
        norm = math.hypot(*norms) if is_sharded(self.parallel_model) else norms[0]
        if not math.isfinite(sum(norms)):  # one device alone may miscalculate
            norm = sum(norms)
        return StepTotals(
            loss=sum(gathered["loss"]),
            norm=norm,
            signal=int(max(gathered["signal"])),
            supervised=sum(gathered["supervised"]),
            tokens=sum(gathered["tokens"]),
        )

    def local_gradients(self) -> list[Tensor]:
        """Return this rank's gradients, or its shards of them."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]

    def optimizer_step(self, totals: StepTotals, batches: list[dict], place: str) -> float:
        """Clip, step and free the gradients; returns the learning rate.

        Raises NotFiniteError on all ranks before the weights change.
        """
        config = self.config
        if not math.isfinite(totals.loss + totals.norm):
            idx = self.processes.all_gather_object([i for b in batches for i in b["idx"].tolist() if i >= 0])
            raise NotFiniteError(
                f"{place}: loss {totals.loss}, gradient norm {totals.norm}, on the training problems {idx}; inspect "
                f"them, or train on more cautiously: {self.cautious_words()}"
            )
        if config.max_grad_norm is not None and totals.norm > config.max_grad_norm:
            for gradient in self.local_gradients():
                gradient.mul_(config.max_grad_norm / totals.norm)
        lr = config.lr * min(1, (self.state.step + 1) / max(config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        zero_grad(self.parallel_model)  # now, so that validation has the memory
        return lr

    def cautious_words(self) -> str:
        """Return the words for the command line that train on from the last checkpoint with a lower learning rate.

        The run itself would refuse to resume with another one; without a checkpoint it begins anew anyway.
        """
        words = {"lr": f"{self.config.lr / 10:.1g}", "max_grad_norm": min(self.config.max_grad_norm or 1.0, 1.0)}
        if self.checkpoint is not None:
            start = {"load_model_path": self.checkpoint, "resume": self.state.epoch}
            words = {"name": f"{self.config.name}_from_{self.checkpoint.name}", **start, **words}
        return shlex.join(f"{key}={value}" for key, value in words.items())

    # --- data ---------------------------------------------------------------------------------------------------------

    def remaining_steps(self, epoch: int, done: int) -> list[StepSpec]:
        """List the optimizer steps of an epoch that are left after `done` of its examples."""
        config, processes, specs = self.config, self.processes, []
        accumulation = config.accumulation_steps(processes.world_size)
        order = epoch_order(self.data, config, epoch, config.problems_per_step(processes.world_size))
        shape = (config.batch_size_training, accumulation, processes.rank, processes.world_size)
        for count, micro_batches in step_batches(order[done:], *shape):
            stage = stage_of(epoch + done / len(self.data), config)
            specs.append(StepSpec(count, stage, micro_batches, filler=order[0]))
            done += count
        return specs

    def make_batches(self, epoch: int, spec: StepSpec) -> list[dict[str, Tensor]]:
        """Make this rank's micro-batches of a step; one without examples has a loss of 0 (its idx is -1)."""
        sequences, batches = self.sequences(spec.stage, epoch), []
        for indices in spec.micro_batches:
            features = sequences.__getitems__(indices or [spec.filler])
            if not indices:
                features = [{**feature, "labels": [-100] * len(feature["labels"]), "idx": -1} for feature in features]
            batches.append(self.collate(features))
        return batches

    def sequences(self, stage: int, epoch: int):
        """Return the training sequences of an epoch at a stage, unshuffled."""
        tokens = self.pretrained.sequence_tokens(self.config.method)
        return get_cot_latent_dataset(stage, self.data, self.config, **tokens, epoch=epoch)

    def first_sequences(self, stage: int, epoch: int) -> list[dict]:
        """Return the first training sequences of a stage as texts: whole, and their supervised part."""
        sequences, decode = self.sequences(stage, epoch), self.pretrained.tokenizer.decode
        return [
            {
                "stage": stage,
                "sequence": decode(item["input_ids"]),
                "supervised": decode([label for label in item["labels"] if label != -100]),
            }
            for item in sequences.__getitems__(range(min(SHOWN, len(sequences))))
        ]

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, best: bool = False) -> None:
        """Save a checkpoint of the current state and apply the retention rules."""
        config, state, processes = self.config, self.state, self.processes
        if config.debug:
            return
        state.metrics_bytes = processes.run_on_rank0(self.log.flush)
        name = f"checkpoint_{state.epoch}" + (f"_step_{state.step}" if state.examples else "")
        checkpoint = self.directory / name
        facts = {"epoch": state.epoch, "improved": best, **self.data_facts}
        facts["problems_per_step"] = config.problems_per_step(processes.world_size)
        description = describe(config, self.pretrained.tokenizer, state.stage, **facts)
        save_checkpoint(checkpoint, self.pretrained, self.model, self.optimizer, state, description, processes)
        self.checkpoint = checkpoint
        if processes.is_rank0:
            prune(checkpoint, config.keep_checkpoints, config.save_only_improve)

    def checkpoint_bytes(self) -> tuple[int, int]:
        """Return the bytes of a checkpoint's weights, float32 in the file, and of its optimizer state."""
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        return sum(4 * p.numel() for p in self.model.parameters()), sum(2 * p.nbytes for p in trained)

    def config_text(self) -> str:
        """Return the resolved config as YAML, with versions and devices as comments."""
        names = {"python": platform.python_version(), "torch": torch.__version__}
        names |= {"transformers": transformers.__version__, "commit": git_commit(), "device": devices(self.processes)}
        comments = "".join(f"# {name} {version}\n" for name, version in names.items())
        accumulation = {"gradient_accumulation_steps": self.config.accumulation_steps(self.processes.world_size)}
        return comments + yaml.safe_dump(self.config.resolved() | accumulation, sort_keys=False)


def git_commit() -> str:
    """Return the commit of this code, or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:  # git is not installed
        return "unknown"
