"""Soak test: runs of two ranks, killed with SIGKILL at random moments, must end like undisturbed ones.

    python tests/stress/soak.py --kills 50

Each kind of run (keep_checkpoints, LoRA, FSDP) gets a share of the kills. First comes an undisturbed run. Then the same
command is started under torchrun again and again, and torchrun and its workers are killed together at a random moment
of each phase in turn. After the last kill, the run may finish and is compared with the undisturbed one: weights,
optimizer state and random state bit by bit, metrics and predictions line by line. A run that finishes earlier is
compared too, and another one starts. Exit code 1 for any difference.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from itertools import cycle, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

KINDS = {
    "keep_checkpoints": {"keep_checkpoints": 2, "parallel": "ddp"},
    "lora": {"lora_rank": 2},
    "fsdp": {"parallel": "fsdp"},
}
PHASES = {  # phase: module and function
    "caching": ("components.tokenization", "tokenize_problems"),
    "training": ("train:Trainer", "train_epoch"),
    "validation": ("evaluate:Validator", "validate"),
    "saving": ("train", "save_checkpoint"),
    "pruning": ("train", "prune"),
}


# --- worker -----------------------------------------------------------------------------------------------------------


def watched(log: Path, words: list[str]) -> None:
    """Execute run.py; rank 0 logs when it enters which phase."""
    if os.environ["RANK"] == "0":
        stack, file = ["start-up"], log.open("a", buffering=1)

        def enter(phase: str) -> None:
            file.write(f"{time.monotonic()} {phase}\n")

        enter("start-up")
        for phase, (owner, name) in PHASES.items():
            watch(owner, name, phase, stack, enter)
    sys.argv = [str(ROOT / "run.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def watch(owner: str, name: str, phase: str, stack: list[str], enter) -> None:
    """Patch a function to call enter(phase) when it starts, and enter(the enclosing phase) when it returns."""
    module, _, class_name = owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, class_name) if class_name else owner
    function = getattr(owner, name)

    @functools.wraps(function)
    def patched(*args, **kwargs):
        if phase == "training":
            stack[0] = phase  # start-up is over
        stack.append(phase)
        enter(phase)
        try:
            return function(*args, **kwargs)
        finally:
            stack.pop()
            enter(stack[-1])

    setattr(owner, name, patched)


# --- launcher ---------------------------------------------------------------------------------------------------------


class Process:
    """A run under torchrun."""

    def __init__(self, setting, name: str, changes: dict):
        self.directory = setting.directory / name
        self.log, self.output = (setting.directory / f"{name}.{suffix}" for suffix in ("phases", "txt"))
        self.log.write_text("")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = [str(ROOT / "tests" / "stress" / "soak.py"), "watched", str(self.log), *setting.words(name, **changes)]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen([sys.executable, *torchrun, *words], stdout=output, stderr=output)

    def phases(self) -> list[tuple[float, str]]:
        """Return the phases so far, each with its start time."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(float(moment), phase) for moment, phase in lines] or [(0.0, "start-up")]

    def wait_for(self, phase: str) -> bool:
        """Wait until the run enters a phase; return False if it ends first."""
        seen = len(self.phases())
        while all(other != phase for _, other in self.phases()[seen - 1 :]):
            if self.process.poll() is not None:
                return False
            time.sleep(0.001)
        return True

    def kill(self) -> str:
        """Kill the run; return its phase."""
        os.kill(self.process.pid, signal.SIGSTOP)  # keep torchrun from restarting workers
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return self.phases()[-1][1]


def descendants(pid: int) -> list[int]:
    """Return the ids of all child processes, recursively."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [*children, *(pid for child in children for pid in descendants(child))]


def durations(process: Process) -> dict[str, float]:
    """Return the mean seconds that a finished run spent in each phase."""
    spans, phases = {}, process.phases()
    for (begin, phase), (end, _) in pairwise(phases):
        spans.setdefault(phase, []).append(end - begin)
    return {phase: sum(times) / len(times) for phase, times in spans.items()}


def disturb(process: Process, target: str, mean: dict[str, float], rng: random.Random) -> str | None:
    """Kill a run at a random moment of a phase; return the phase it was in, or None if it finished first."""
    if target not in ("start-up", "caching"):
        if not process.wait_for("training"):
            return None
        time.sleep(rng.uniform(0, 2))  # not always at the first save or validation
    if not process.wait_for(target):
        return None
    time.sleep(rng.uniform(0, mean[target]))
    return process.kill() if process.process.poll() is None else None


def newest(directory: Path) -> str:
    """Return the name of the checkpoint that `last` points to."""
    return os.readlink(directory / "last") if (directory / "last").is_symlink() else "none yet"


def clear_cache(cache: Path) -> None:
    """Empty the cache of tokenized data, except for what a kill left unfinished, so that every start fills it."""
    for path in cache.glob("coconut/*.arrow"):
        path.unlink()


def differs(run: Path, reference: Path) -> int:
    """Compare two finished runs; print the result, return 1 if they differ."""
    from helpers.setting import assert_same, metrics

    try:
        assert_same(run, reference)
    except AssertionError as error:
        print(f"DIFFERENT: {run.name}: {error}", flush=True)
        return 1
    lines = len(metrics(run))
    print(f"{run.name}: weights, optimizer, random state, {lines} lines of metrics: no difference", flush=True)
    return 0


def soak(setting, kind: str, kills: int, rng: random.Random) -> tuple[Counter, int]:
    """Kill runs of one kind until all kills are done and the last run has finished.

    Returns: number of kills per phase, and number of runs that differ.
    """
    changes, targets = KINDS[kind], cycle(["start-up", *PHASES])
    clear_cache(Path(setting.values["data_cache"]))
    undisturbed = Process(setting, f"{kind}_undisturbed", changes)
    assert undisturbed.process.wait() == 0, undisturbed.output.read_text(errors="replace")
    mean, struck, failures, run = durations(undisturbed), Counter(), 0, 1
    print(f"{kind}: mean seconds in a phase: {json.dumps({k: round(v, 3) for k, v in mean.items()})}", flush=True)
    while struck.total() < kills or run:
        clear_cache(Path(setting.values["data_cache"]))
        process = Process(setting, f"{kind}_killed_{run}", changes)
        place = disturb(process, next(targets), mean, rng) if struck.total() < kills else None
        if place:
            struck[place] += 1
            print(f"kill {struck.total():3} in {place:10} newest: {newest(process.directory)}", flush=True)
            continue
        if code := process.process.wait():
            print(f"exit code {code}:\n{process.output.read_text(errors='replace')}")
            return struck, failures + 1
        failures += differs(process.directory, undisturbed.directory)
        run = run + 1 if struck.total() < kills else 0
    return struck, failures


def make_setting(directory: Path, epochs: int):
    """Create problems, a tiny model, and a config that saves often."""
    from helpers import make_problems, write_json
    from helpers.setting import Setting

    setting = Setting(directory)
    setting.values |= {"num_epochs": epochs, "epochs_per_stage": epochs // 3, "save_every_steps": 4}
    setting.values |= {"train_path": write_json(directory / "more.json", make_problems(80))}
    setting.values |= {"data_cache": str(directory / "cache")}
    return setting


def main() -> int:
    """Run the soak test; print the kills per phase and the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=24, help="epochs per run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    args = parser.parse_args()
    print(json.dumps(vars(args)), flush=True)
    rng, lines, failures = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as directory:
        setting = make_setting(Path(directory), args.epochs)
        for number, kind in enumerate(KINDS):
            share = len(range(number, args.kills, len(KINDS)))
            struck, different = soak(setting, kind, share, rng)
            failures += different
            where = ", ".join(f"{struck[phase]} in {phase}" for phase in ("start-up", *PHASES))
            lines.append(f"{kind}: {struck.total()} kills ({where}), {different} differences")
    print("\n".join([*lines, f"{args.kills} kills, {failures} differences"]))
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["watched"]:
        watched(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
