"""A soak: one run, killed with SIGKILL at random moments, must end as if nothing had ever happened.

    python tests/soak.py --kills 50
    python tests/soak.py --kills 20 --processes 2      (torchrun and its workers, all killed at once)

A run that nothing disturbs comes first. Then the same command is started again and again and killed after a
random delay, in start-up, training, validation or a save. After the last kill the run may finish, and is compared with
the first one: weights, optimizer and random streams bit by bit, metrics and predictions line by line. A run that
finishes before that is compared, too, and another one begins. The exit code is 1 for any difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from helpers import make_problems, write_json  # noqa: E402
from setting import Setting, assert_same, metrics  # noqa: E402


class Process:
    """A run as a user starts it."""

    def __init__(self, setting: Setting, name: str, processes: int):
        self.directory = setting.directory / name
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher = torchrun if processes > 1 else []
        command = [sys.executable, *launcher, str(ROOT / "run.py"), *setting.words(name)]
        self.started, self.output = time.monotonic(), setting.directory / f"{name}.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def wait(self, seconds: float | None) -> int | None:
        """The exit code, or None if the run goes on after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_for_training(self) -> float:
        """The seconds that start-up took."""
        while self.process.poll() is None and "step/s" not in self.output.read_text(errors="replace"):
            time.sleep(0.05)
        return time.monotonic() - self.started

    def kill(self) -> str:
        """Kills the run and says what it was doing."""
        place = self.place()
        os.kill(self.process.pid, signal.SIGSTOP)  # torchrun starts no more workers
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return place

    def place(self) -> str:
        """What the run is doing, as far as its output and its directory tell."""
        if list(self.directory.glob("*.partial")):
            return "saving"
        text = self.output.read_text(errors="replace")
        return max(("start-up", "step/s", "validation"), key=text.rfind).replace("step/s", "training")


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [*children, *(pid for child in children for pid in descendants(child))]


def longest_delay(startup: float, training: float, kills: int) -> float:
    """The bound of random delays with which so many attempts together train for about as long as the run needs.

    A delay is uniform in 0 .. bound, so an attempt trains for (bound - startup)^2 / (2 bound) seconds on average.
    """
    share = startup + training / kills
    return share + (share**2 - startup**2) ** 0.5


def newest(directory: Path) -> str:
    """The name of the checkpoint that last points to."""
    return os.readlink(directory / "last") if (directory / "last").is_symlink() else "none yet"


def differences(run: Path, reference: Path) -> int:
    """Compares two finished runs; prints the verdict, and returns 1 where they differ."""
    try:
        assert_same(run, reference)
    except AssertionError as error:
        print(f"DIFFERENT: {run.name}: {error}", flush=True)
        return 1
    lines = len(metrics(run))
    print(f"{run.name}: weights, optimizer, random streams, {lines} lines of metrics: no difference", flush=True)
    return 0


def soak(setting: Setting, kills: int, processes: int, rng: random.Random) -> int:
    """Kills runs until as many kills are done and the last run has finished; returns the number that differ."""
    undisturbed = Process(setting, "undisturbed", processes)
    startup = undisturbed.wait_for_training()
    assert undisturbed.wait(None) == 0, undisturbed.output.read_text(errors="replace")
    total = time.monotonic() - undisturbed.started
    bound = longest_delay(startup, total - startup, kills)
    print(f"undisturbed: {total:.0f} s, {startup:.0f} s of them start-up; kills after 0 to {bound:.0f} s", flush=True)
    done, failures, run = 0, 0, 1
    while done < kills or run:
        name = f"killed_{run}"
        process = Process(setting, name, processes)
        delay = rng.uniform(0, bound) if done < kills else None
        code = process.wait(delay)
        if code is None:
            done, place = done + 1, process.kill()
            print(f"kill {done:3} after {delay:4.1f} s in {place:10} newest: {newest(process.directory)}", flush=True)
            continue
        if code != 0:
            print(f"exit code {code}:\n{process.output.read_text(errors='replace')}")
            return failures + 1
        failures += differences(process.directory, undisturbed.directory)
        run = run + 1 if done < kills else 0
    return failures


def main() -> int:
    """Soaks, and says whether anything was different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=180, help="the length of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the delays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        setting = Setting(Path(directory))
        problems = write_json(setting.directory / "more.json", make_problems(200))
        setting.values |= {"num_epochs": arguments.epochs, "epochs_per_stage": arguments.epochs // 3}
        setting.values |= {"train_path": problems, "keep_checkpoints": 2, "save_every_steps": 7}
        print(json.dumps(vars(arguments)), flush=True)
        failures = soak(setting, arguments.kills, arguments.processes, random.Random(arguments.seed))
    print(f"{arguments.kills} kills, {failures} differences")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
