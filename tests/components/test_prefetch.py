"""Batches prepared by workers: in order, without touching random number generators, and no worker left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from components.errors import STOP_SIGNALS
from components.prefetch import prefetch
from helpers import REPOSITORY
from helpers.faults import Fault
from helpers.setting import Setting, assert_same

slow = pytest.mark.slow


def make(item: int) -> tuple[int, list[dict]]:
    """A batch, made with random numbers of the process."""
    random.random(), torch.rand(1)
    return item, [{"ids": torch.full((2, 3), item), "flags": torch.eye(3, dtype=torch.bool)[:, :2], "none": None}]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_and_random_states_do_not_depend_on_the_number_of_workers(workers):
    states = torch.get_rng_state(), random.getstate()
    made = list(prefetch(make, range(10, 17), workers))
    if workers:
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [item for item, _ in made] == list(range(10, 17))
    for item, [batch] in made:
        batch["ids"] += 1  # as writable as if it were made here
        assert torch.equal(batch["ids"], torch.full((2, 3), item + 1))
        assert torch.equal(batch["flags"], torch.eye(3, dtype=torch.bool)[:, :2]) and batch["none"] is None


def test_no_items():
    assert list(prefetch(make, [], 2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_make_is_raised_in_the_parent(workers):
    def fail(item: int) -> int:
        if item == 2:
            raise ValueError("item 2")
        return item

    made = prefetch(fail, range(4), workers)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(made)


def test_workers_fork_from_a_process_that_has_tokenized_with_threads():
    """They could tokenize, and tokenizers does not warn, although TOKENIZERS_PARALLELISM is not set."""
    program = f"""
import sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
from components.prefetch import prefetch
from components.tokenization import tokenize_problems
from helpers import byte_tokenizer, make_problems
tokenizer = byte_tokenizer()
tokenize_problems(make_problems(50), tokenizer)
print(list(prefetch(lambda text: tokenizer([text, text])["input_ids"] != [], ["a", "b"], 2)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[True, True]\n", done.stderr
    assert "TOKENIZERS_PARALLELISM" not in done.stderr


# --- signals and ends, in an interpreter of its own -------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if the tests are run by nohup
sys.path.insert(0, sys.argv[1])
from utils import StopRequest
from components.prefetch import prefetch

action, kept = sys.argv[2], []

def make(item):
    if item == 8 and action == "worker raises":
        raise ValueError("item 8")
    if item == 7 and action in ("worker hangs", "kill", "os._exit"):
        time.sleep(1000)
    time.sleep(0.05)
    return item, os.getpid()

def consume():
    for item, worker in made:
        print(worker, flush=True)
        if item == 5 and action == "raise":
            raise RuntimeError("an error")
        if item == 5 and action == "keep the error":
            try:
                raise RuntimeError("an error")
            except RuntimeError as error:
                return kept.append(error)
        if item == 5 and action in ("sys.exit", "worker hangs"):
            sys.exit(3)
        if item == 5 and action == "os._exit":
            os._exit(4)
        if item == 5 and action == "kill":
            os.kill(os.getpid(), 9)
        if item == 5 and action == "kill worker":
            os.kill(worker, 9)
        if stop.signal:
            return

with StopRequest() as stop:
    made = prefetch(make, range(200), 2)
    consume()
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
    """Whether all these processes end within two seconds: torch's own watchdog may take five."""
    for _ in range(20):
        if not any(lives(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    "number", [STOP_SIGNALS[0], *(pytest.param(signal, marks=slow) for signal in STOP_SIGNALS[1:])]
)
def test_workers_ignore_a_signal_to_the_process_group(number):
    with start("go on") as process:
        workers = {int(process.stdout.readline()) for _ in range(4)}
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.endswith(f"signal {int(number)}\n")
    assert len(workers) == 2 and ended(workers)


ENDS = [("kill", -9), ("raise", 1), ("keep the error", 0), ("sys.exit", 3), ("os._exit", 4)]
ENDS += [("worker raises", 1), ("worker hangs", 3)]


@pytest.mark.parametrize(("action", "code"), [ENDS[0], *(pytest.param(*end, marks=slow) for end in ENDS[1:])])
def test_no_worker_outlives_its_parent_or_makes_its_exit_hang(action, code):
    with start(action) as process:
        workers = {int(process.stdout.readline()) for _ in range(6)}
        process.wait(timeout=60)  # for the parent alone; communicate would wait for all that hold its pipes
        assert ended(workers)
        _, errors = process.communicate()
    assert process.returncode == code, errors
    assert len(workers) == 2 and "Exception ignored" not in errors


def test_a_worker_that_dies_is_an_error_in_the_parent():
    with start("kill worker") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "DataLoader worker" in errors


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("prefetch"))


WORKERS = [(1, None), (2, Fault("kill", "backward", 9)), (2, Fault("sigterm", "step", 6))]


@pytest.mark.parametrize(("workers", "fault"), WORKERS, ids=["undisturbed", "killed", "stopped"])
def test_training_with_workers_is_bit_for_bit_the_same(setting, workers, fault):
    """In a run with random stages, dropout, and accumulation that is cut short in the middle of an epoch."""
    name = f"workers_{workers}_{fault.action if fault else 'whole'}"
    if fault:
        assert setting.run(name, fault=fault, data_workers=workers).codes == [143 if fault.action == "sigterm" else -9]
    outcome = setting.run(name, data_workers=workers)
    assert outcome.codes == [0], outcome.output
    assert_same(setting.directory / name, setting.reference())


@pytest.mark.parametrize(
    "changes", [{"method": "icot", "remove_per_epoch": 5}, pytest.param({"group_by_length": True}, marks=slow)], ids=str
)
def test_two_ranks_with_workers_train_with_stages_within_an_epoch_and_grouping(setting, changes):
    name = "-".join(changes)
    assert setting.run(name, 2, data_workers=2, **changes).codes == [0, 0]
    assert_same(setting.directory / name, setting.reference(2, **changes))
