"""Profile a real epoch: data, forward, backward, optimizer, validation, saving.

    python benchmarks/epoch.py args/prosqa_coconut.yaml [key=value ...] [--steps 50]

Runs the first steps of an epoch of the config (`resume` selects the stage) with synchronized timers around the
trainer's own functions, then one validation and one save, and scales the steps to the epoch.
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
    """Add the seconds of the block, including GPU work, to times[name]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[name] += time.perf_counter() - started


def train_steps(trainer: Trainer, limit: int) -> tuple[dict[str, float], float, float]:
    """Time the first steps of the epoch, after one warm-up step.

    Returns: seconds by part, the share of the epoch that was run, and the share of padding in its batches. "data" is
    the time that steps wait for batches, plus a proportional share of computing the epoch's order.
    """
    config, times = trainer.config, defaultdict(float)
    with clocked(times, "data"):
        steps = trainer.remaining_steps(config.resume, 0)
        trainer.enter_stage(steps[0].stage, config.resume)
    limit = min(limit, len(steps) - 1)
    once = times.pop("data") * limit / len(steps)
    make = partial(trainer.make_batches, config.resume)
    batches_ahead = prefetch_batches(make, steps[: limit + 1], config, trainer.processes)
    trainer.model.train()
    tokens = columns = 0
    for number in range(limit + 1):
        if number == 1:
            times.clear()
            tokens = columns = 0
        with clocked(times, "data"):
            batches = next(batches_ahead)
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
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.config, [*args.overrides, f"save_path={folder}", "logger=none"])
        times = defaultdict(float)
        with clocked(times, "reading, tokenizing, loading (once)"):
            trainer = set_up(config, init_distributed(), StopRequest())
        steps, share, padding = train_steps(trainer, args.steps)
        epoch = {name: seconds / share for name, seconds in steps.items()}
        with clocked(epoch := defaultdict(float, epoch), "validation"):
            trainer.validator.validate(trainer.state.stage)
        trainer.directory.mkdir(parents=True)
        with clocked(epoch, "saving"):
            trainer.save()
    total = sum(epoch.values())
    print(f"\n{args.config}, {share:.1%} of the steps measured, {padding:.1%} of their columns padding")
    print(f"{environment(trainer.processes.device.type)}\n")
    print("| piece | seconds per epoch | share |\n|---|---|---|")
    for name, seconds in epoch.items():
        print(f"| {name} | {seconds:.1f} | {seconds / total:.1%} |")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.1f} | |")


if __name__ == "__main__":
    main()
