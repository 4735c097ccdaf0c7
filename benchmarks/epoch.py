"""Where the time of a real epoch goes: data, forward, backward, optimizer, validation, saving.

    python benchmarks/epoch.py args/prosqa_coconut.yaml [key=value ...] [--steps 50]

Runs the first steps of an epoch of the given config (whose stage `resume` chooses), piece by piece with the run's own
functions and a synchronized clock between them, then one validation and one save, and scales the steps to the epoch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial

import torch
from train_step import ROOT, environment

sys.path.insert(0, str(ROOT))

from components.distributed import init_distributed
from config import load_config
from dataset import model_args, prefetch_batches
from run import set_up
from train import Trainer
from utils import StopRequest


@contextmanager
def clocked(times: dict[str, float], name: str):
    """Adds the seconds that the block takes, the GPU's work included, to times[name]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[name] += time.perf_counter() - started


def train_steps(trainer: Trainer, limit: int) -> tuple[dict[str, float], float, float]:
    """The seconds by piece of the epoch's first steps, the share of the epoch that these steps are, and the share of
    padding in their batches. The very first step is a warm-up that does not count. Data: the order of the whole epoch,
    in proportion, and the time for which a step waits for its batches."""
    config, device, times = trainer.config, trainer.processes.device, defaultdict(float)
    with clocked(times, "data"):
        steps = trainer.remaining_steps(config.resume, 0)
        trainer.enter_stage(steps[0].stage, config.resume)
    limit = min(limit, len(steps) - 1)
    once = times.pop("data") * limit / len(steps)
    make = partial(trainer.make_batches, config.resume)
    made = prefetch_batches(make, steps[: limit + 1], config, device)
    trainer.model.train()
    tokens = columns = 0
    for number in range(limit + 1):
        if number == 1:
            times.clear()
            tokens = columns = 0
        with clocked(times, "data"):
            batches = next(made)
        for batch in batches:
            tokens, columns = tokens + batch["attention_mask"].sum().item(), columns + batch["attention_mask"].numel()
            with clocked(times, "forward"), trainer.validator.autocast():
                loss = trainer.parallel_model(**model_args(batch)).loss
            with clocked(times, "backward"):
                loss.backward()
        with clocked(times, "optimizer"):
            torch.nn.utils.get_total_norm(trainer.local_gradients())
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
    times["data"] += once
    return times, limit / len(steps), 1 - tokens / columns


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.config, [*arguments.overrides, f"save_path={folder}", "logger=none"])
        times = defaultdict(float)
        with clocked(times, "reading, tokenizing, loading (once)"):
            trainer = set_up(config, init_distributed(), StopRequest())
        steps, share, padding = train_steps(trainer, arguments.steps)
        epoch = {name: seconds / share for name, seconds in steps.items()}
        with clocked(epoch := defaultdict(float, epoch), "validation"):
            trainer.validator.validate(trainer.state.stage)
        trainer.directory.mkdir(parents=True)
        with clocked(epoch, "saving"):
            trainer.save()
    total = sum(epoch.values())
    print(f"\n{arguments.config}, {share:.1%} of the steps measured, {padding:.1%} of their columns padding")
    print(f"{environment(trainer.processes.device.type)}\n")
    print("| piece | seconds per epoch | share |\n|---|---|---|")
    for name, seconds in epoch.items():
        print(f"| {name} | {seconds:.1f} | {seconds / total:.1%} |")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.1f} | |")


if __name__ == "__main__":
    main()
