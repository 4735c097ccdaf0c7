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

import torch
from train_step import ROOT, environment

sys.path.insert(0, str(ROOT))

from build import build, inputs
from checkpoint import problems_per_step
from config import load_config
from dataset import get_cot_latent_dataset, step_batches
from evaluate import validate
from parallel import start_processes
from train import Trainer, collate
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
    padding in their batches. The first step is made twice: once to warm up."""
    run, config, times = trainer.run, trainer.run.config, defaultdict(float)
    steps = step_batches(
        range(len(run.train_examples)), config.batch_size_training, config.gradient_accumulation_steps, 0, 1
    )
    with clocked(times, "data"):
        trainer.enter_stage(config.resume)
        options = {"shuffle": True, "epoch": config.resume, "step_size": problems_per_step(config, run.processes)}
        dataset = run.sequences(get_cot_latent_dataset, trainer.state.stage, run.train_examples, **options)
    once = times.pop("data") * min(limit, len(steps)) / len(steps)
    run.model.train()
    tokens = columns = 0
    for number, (_, passes) in enumerate([steps[0], *steps[:limit]]):
        if number == 1:
            times.clear()
            tokens = columns = 0
        for indices in passes:
            with clocked(times, "data"):
                batch = collate(run, dataset, indices)
            tokens, columns = tokens + batch["attention_mask"].sum().item(), columns + batch["attention_mask"].numel()
            with clocked(times, "forward"), run.autocast():
                loss = trainer.model(**inputs(batch)).loss
            with clocked(times, "backward"):
                loss.backward()
        with clocked(times, "optimizer"):
            trainer.gradient_norm()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
    times["data"] += once
    return times, min(limit, len(steps)) / len(steps), 1 - tokens / columns


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
            trainer = Trainer(build(config, start_processes(), StopRequest()))
        steps, share, padding = train_steps(trainer, arguments.steps)
        epoch = {name: seconds / share for name, seconds in steps.items()}
        with clocked(epoch := defaultdict(float, epoch), "validation"):
            validate(trainer.run, trainer.state.stage)
        trainer.run.directory.mkdir(parents=True)
        with clocked(epoch, "saving"):
            trainer.save()
    total = sum(epoch.values())
    print(f"\n{arguments.config}, {share:.1%} of the steps measured, {padding:.1%} of their columns padding")
    print(f"{environment(trainer.run.processes.device.type)}\n")
    print("| piece | seconds per epoch | share |\n|---|---|---|")
    for name, seconds in epoch.items():
        print(f"| {name} | {seconds:.1f} | {seconds / total:.1%} |")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.1f} | |")


if __name__ == "__main__":
    main()
