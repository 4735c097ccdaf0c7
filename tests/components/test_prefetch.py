"""Things that are made ahead by worker processes: in order, without a trace in random streams, and never orphaned."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from components.prefetch import prefetch
from helpers import REPOSITORY


def make(item: int) -> tuple[int, list[dict]]:
    """A batch, made with random numbers of the process."""
    random.random(), torch.rand(1)
    return item, [{"ids": torch.full((2, 3), item), "flags": torch.eye(3, dtype=torch.bool)[:, :2], "none": None}]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_is_made_ahead_is_what_would_be_made(workers):
    states = torch.get_rng_state(), random.getstate()
    made = list(prefetch(make, range(10, 17), workers))
    if workers:
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [item for item, _ in made] == list(range(10, 17))
    for item, [batch] in made:
        batch["ids"] += 1  # as writable as if it were made here
        assert torch.equal(batch["ids"], torch.full((2, 3), item + 1))
        assert torch.equal(batch["flags"], torch.eye(3, dtype=torch.bool)[:, :2]) and batch["none"] is None


def test_nothing_to_make():
    assert list(prefetch(make, [], 2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_reaches_the_user_of_what_is_made(workers):
    def fail(item: int) -> int:
        if item == 2:
            raise ValueError("item 2")
        return item

    made = prefetch(fail, range(4), workers)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(made)


# --- signals and ends, in a process of its own ------------------------------------------------------------------------

PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from utils import StopRequest
from components.prefetch import prefetch

def make(item):
    time.sleep(0.05)
    return item, os.getpid()

with StopRequest() as stop:
    for item, worker in prefetch(make, range(200), 2):
        print(worker, flush=True)
        if item == 5 and sys.argv[2] == "raise":
            raise RuntimeError("an error")
        if item == 5 and sys.argv[2] == "kill":
            os.kill(os.getpid(), 9)
        if item == 5 and sys.argv[2] == "kill worker":
            os.kill(worker, 9)
        if stop.signal:
            break
print("signal", stop.signal)
"""


def start(action: str) -> subprocess.Popen:
    """The program in a process group of its own, as a terminal starts it."""
    words = [sys.executable, "-c", PROGRAM, str(REPOSITORY), action]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, start_new_session=True, **pipes)


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pids: set[int]) -> bool:
    """Whether all these processes end within two seconds: a DataLoader's own workers may take five."""
    for _ in range(20):
        if not any(lives(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_is_for_the_parent(number):
    with start("go on") as process:
        workers = {int(process.stdout.readline()) for _ in range(4)}
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.endswith(f"signal {int(number)}\n")
    assert len(workers) == 2 and ended(workers)


@pytest.mark.parametrize(("action", "code"), [("kill", -9), ("raise", 1)])
def test_no_worker_outlives_its_parent(action, code):
    with start(action) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert ended({int(pid) for pid in output.split()})  # with the locks that they held, before a restarted run asks


def test_a_worker_that_dies_is_an_error_of_its_parent():
    with start("kill worker") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "DataLoader worker" in errors
