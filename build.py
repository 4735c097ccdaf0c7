"""What all parts of a run share, and how it is put together from a config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coconut import Coconut
from components.checkpoint import check_intact, check_same_training
from components.checkpoint_manager import latest_checkpoint
from components.distributed import Processes, check_shared_filesystem
from components.errors import Interrupted
from components.files import MANIFEST
from components.lora import add_lora
from components.parallelize import replicate
from components.prefetch import prefetch
from components.pretrained import Pretrained, load_on_rank0
from components.tokenization import TEXTS, TOKENS, default_cache, load_tokenized
from config import Config, UserError, read_yaml
from curriculum import METHODS, stage_of
from dataset import MyCollator, SequenceDataset, check_lengths
from utils import StopRequest, set_seed

if TYPE_CHECKING:
    from datasets import Dataset

DEBUG_TRAIN, DEBUG_VALID = 5000, 32  # problems in a debug run


@dataclass
class Run:
    """A run's config and processes, its model, and its tokenized problems.

    model: whole in the main process; in the others without memory, until `distribute` or `replicate` shares it out;
    checkpoint: the one that the run goes on from, None for a fresh start; stop: whether a signal asks it to end;
    train_examples: None for only_eval; valid_problems: the texts of valid_examples; keep_weights: whether sharded
    weights stay whole from a step's first pass to its end.
    """

    config: Config
    processes: Processes
    stop: StopRequest
    checkpoint: Path | None
    pretrained: Pretrained
    model: Coconut
    train_examples: Dataset | None
    valid_problems: Dataset
    valid_examples: Dataset
    keep_weights: bool = True

    @property
    def directory(self) -> Path:
        """Where the run's files are."""
        return Path(self.config.save_path) / self.config.name

    def collate(self, features: list[dict]) -> dict:
        """Pads features into a batch; see `MyCollator`, with the model's `plan` of it. Worker processes call it, which
        must leave a GPU alone."""
        batch = MyCollator(self.pretrained.tokenizer, self.model.latent_token_id)(features)
        return batch | {"plan": self.model.plan(batch["input_ids"], batch["attention_mask"], batch.get("labels"))}

    def ahead(self, make: Callable, items: Sequence) -> Iterator:
        """make(item), which collates, for every item in order, as config.data_workers asks for; see `prefetch`.

        For a GPU the tensors lie in pinned memory, from where they are copied without a wait.
        """
        on_gpu = self.processes.device.type == "cuda"
        workers = self.config.data_workers
        return prefetch(make, items, int(on_gpu) if workers is None else workers, pin=on_gpu)

    def autocast(self):
        """bfloat16 arithmetic over float32 weights, where the config asks for it."""
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self.config.bf16)

    def stop_together(self) -> None:
        """Raises Interrupted in every process if a signal reached any of them."""
        [signal] = self.processes.max([self.stop.signal])
        if signal:
            raise Interrupted(int(signal))

    def sequences(self, make, stage: int, examples: Dataset, **options) -> SequenceDataset:
        """A data set of `make` (get_cot_latent_dataset or get_question_latent_dataset) for the run's method."""
        method = METHODS[self.config.method]
        ids = self.pretrained.prompt_ids(self.config.method)
        return make(stage, examples, self.config, *ids, no_special_marker=not method.markers, **options)


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch."""
    return {key: value for key, value in batch.items() if key != "idx"}


def build(config: Config, processes: Processes, stop: StopRequest) -> Run:
    """Loads the model and the data; whatever is wrong with them is found here, before anything of a run is written."""
    if not config.only_eval:
        config.gradient_accumulation_steps = accumulation_steps(config, processes)
    checkpoint = find_checkpoint(config, processes)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    set_seed(config.seed)  # random weights come from the main process
    # With adapters a checkpoint brings only what is trained, and the frozen weights come from where they came before.
    path = (None if config.lora_rank else checkpoint) or config.load_model_path
    if path != checkpoint or path is None:  # one that is continued has been checked
        processes.run_on_rank0(lambda: check_intact(config, path))
    pretrained = load_on_rank0(config, path, processes)
    if config.lora_rank and not config.only_eval:
        new_ids = [pretrained.token_id(token) for token in METHODS[config.method].tokens]
        add_lora(pretrained.lm, config.lora_rank, new_ids, config.bf16)
    set_seed(config.seed, processes.rank)  # dropout masks of its own for every process
    train, valid = load_data(config, pretrained, processes)
    texts, examples = valid.select_columns(TEXTS), valid.select_columns(TOKENS)
    model = pretrained.coconut()
    if config.only_eval:  # for training, `distribute` decides what each process holds
        replicate(model, processes)
    return Run(config, processes, stop, checkpoint, pretrained, model, train, texts, examples)


def accumulation_steps(config: Config, processes: Processes) -> int:
    """The forward passes of an optimizer step, from global_batch_size if it is given."""
    at_once = config.batch_size_training * processes.world_size
    passes, rest = divmod(config.global_batch_size or at_once * config.gradient_accumulation_steps, at_once)
    if rest or not passes:
        made = f"batch_size_training {config.batch_size_training} x {processes.world_size} processes"
        raise UserError(f"global_batch_size: {config.global_batch_size} is no multiple of {made}; change one of them")
    return passes


def load_data(config: Config, pretrained: Pretrained, processes: Processes) -> tuple[Dataset | None, Dataset]:
    """The tokenized problems to train on (None for only_eval) and those to validate with, which keep their texts."""
    train_size, valid_size = (DEBUG_TRAIN, DEBUG_VALID) if config.debug else (None, None)
    sources = [] if config.only_eval else [(config.train_path, train_size)]
    sources.append((config.val_path, valid_size))
    folder = None if config.debug else config.data_cache or default_cache()
    *train, valid = load_tokenized(sources, pretrained.tokenizer, folder, processes)
    train = train[0].select_columns(TOKENS) if train else None
    if limit := getattr(pretrained.lm.config, "max_position_embeddings", None):
        stages = {stage_of(epoch, config) for epoch in range(config.resume, config.num_epochs)}
        if train is None:
            stages = {evaluation_stage(config, pretrained)}
        else:
            check_lengths(train, stages, config, limit, config.train_path)
        check_lengths(valid, stages, config, limit, config.val_path, mix_stages=False)
    return train, valid


def evaluation_stage(config: Config, pretrained: Pretrained) -> int:
    """The stage of only_eval: that of epoch `resume` if it is given, else that of the checkpoint."""
    return stage_of(config.resume, config) if config.resume else pretrained.description.get("stage", 0)


def find_checkpoint(config: Config, processes: Processes) -> Path | None:
    """The checkpoint from which the same command, given again, continues its run. None for a fresh start.

    The main process looks and decides for all.
    """
    directory = Path(config.save_path) / config.name
    if config.debug or config.only_eval:
        return None
    checkpoint = processes.run_on_rank0(lambda: latest_checkpoint(directory))
    if checkpoint is not None:
        check_shared_filesystem(checkpoint / MANIFEST, processes)
        check_same_training(read_yaml(directory / "config.yaml"), config, checkpoint, processes)
    return checkpoint
