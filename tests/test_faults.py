"""Fault injection: after any fault, resuming ends bit-identical to an uninterrupted run (docs/fault_tolerance.md).

Every run is the real program in its own processes. Most are forked by `faults.launch`; a few are started by python or
torchrun, as a user would.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

import run
from components.checkpoint_manager import list_checkpoints
from components.files import verify_manifest
from dataset import step_batches
from helpers import run_script, snapshot
from helpers.faults import ROOT, Fault, flip, launch, truncate
from helpers.setting import Setting, assert_same, flat_state, metrics
from utils import StopRequest


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def name(request) -> str:
    """A run name that is unique to the test."""
    return re.sub(r"\W+", "_", request.node.name)


def slow(*values):
    """A parameter set that is marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def show(value) -> str:
    """The id of a parameter."""
    if not isinstance(value, Fault):
        return str(getattr(value, "__name__", value))
    return f"{value.action}-{value.place}-{value.step}" + (f"-rank{value.rank}" if value.rank else "")


# --- SIGKILL, dead ranks ----------------------------------------------------------------------------------------------

KILLS = [
    Fault("kill", "step", 1),  # before anything is saved
    slow(Fault("kill", "step", 6)),  # between two saves
    Fault("kill", "backward", 9),  # within the first step of a stage, which resets the optimizer
    slow(Fault("kill", "validation", 8)),
    slow(Fault("kill", "log", 6)),
    Fault("kill", "state", 3),  # during the first save
    slow(Fault("kill", "state", 12)),
    slow(Fault("kill", "moments", 12)),
    Fault("kill", "slim", 8),  # the optimizer state of an older checkpoint is out of the manifest but not yet deleted
    slow(Fault("kill", "rename", 6)),
    Fault("kill", "renamed", 12),  # the checkpoint is complete, best and last do not point to it yet
    slow(Fault("kill", "renamed", 16)),  # the very last save
]


@pytest.mark.parametrize("fault", KILLS, ids=show)
def test_resume_after_sigkill_is_bit_identical(setting, name, fault):
    assert setting.run(name, fault=fault).codes == [-9]
    again = setting.run(name)
    assert again.codes == [0], again.output
    assert_same(setting.directory / name, setting.reference())


def test_resume_after_repeated_sigkill_is_bit_identical(setting, name):
    for step in range(2, 17, 2):
        assert setting.run(name, fault=Fault("kill", "backward", step)).codes == [-9]
    assert setting.run(name).codes == [0]
    assert_same(setting.directory / name, setting.reference())


@pytest.mark.parametrize(
    "fault",
    [
        Fault("kill", "renamed", 12, lacking=errno.EOPNOTSUPP),
        slow(Fault("kill", "state", 12, lacking=errno.EPERM)),
        slow(Fault("kill", "slim", 8, lacking=errno.EINVAL)),
        slow(Fault("sigterm", "step", 6, lacking=errno.EPERM)),
    ],
    ids=show,
)
def test_file_system_without_links_and_sync_of_directories_resumes_bit_identically(setting, name, fault):
    assert setting.run(name, fault=fault).codes == [CODES.get(fault.action, -9)]
    again = setting.run(name, fault=Fault("none", lacking=fault.lacking))
    assert again.codes == [0], again.output
    run = setting.directory / name
    assert_same(run, setting.reference())
    assert not (run / "best").is_symlink() and not list(run.glob("earlier_*"))
    for note in ("has no links", "cannot sync directories"):
        assert again.output.count(note) == 1
    evaluated = setting.run(f"{name}_eval", only_eval=True, load_model_path=run / "best")
    assert evaluated.codes == [0], evaluated.output
    best = os.readlink(setting.reference() / "best")
    assert (setting.directory / f"{name}_eval" / f"eval_{best}").is_dir()


DEATHS = [
    Fault("kill", "backward", 4, rank=1),
    Fault("raise", "step", 6, rank=1),
    Fault("kill", "step", 6, rank=0),
    Fault("kill", "state", 4),
    Fault("kill", "validation", 4, rank=1),
]


@pytest.mark.parametrize(
    ("fault", "parallel"),
    [(DEATHS[0], "ddp"), *(slow(fault, "ddp") for fault in DEATHS[1:]), *(slow(fault, "fsdp") for fault in DEATHS)],
    ids=show,
)
def test_peers_exit_when_a_rank_dies(setting, name, fault, parallel):
    outcome = setting.run(name, 2, fault, parallel=parallel)
    assert 0 not in outcome.codes
    assert outcome.codes[fault.rank] == (-9 if fault.action == "kill" else 1)
    again = setting.run(name, 2, parallel=parallel)
    assert again.codes == [0, 0], again.output
    assert_same(setting.directory / name, setting.reference(2, parallel=parallel))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_on_four_ranks_is_bit_identical(setting, name, parallel):
    changes = {"parallel": parallel, "batch_size_training": 1}
    outcome = setting.run(name, 4, Fault("kill", "backward", 6, rank=2), **changes)
    assert outcome.codes[2] == -9 and 0 not in outcome.codes
    assert setting.run(name, 4, **changes).codes == [0] * 4
    assert_same(setting.directory / name, setting.reference(4, **changes))


# --- SIGTERM and SIGINT -----------------------------------------------------------------------------------------------

STOPS = [
    Fault("sigterm", "step", 6),
    slow(Fault("sigint", "step", 6)),
    Fault("sigusr1", "step", 6),
    slow(Fault("sighup", "step", 6)),
    Fault("sigterm", "step", 8),  # the last step of an epoch: only its validation is left
    slow(Fault("sigterm", "validation", 8)),
    slow(Fault("sigint", "validation", 16)),
    Fault("sigterm", "state", 8),  # during an epoch's save
    slow(Fault("sigterm", "renamed", 12)),
]
CODES = {"sigterm": 143, "sigint": 130, "sigusr1": 128 + signal.SIGUSR1, "sighup": 129}


@pytest.mark.parametrize("fault", STOPS, ids=show)
def test_signals_save_a_checkpoint(setting, name, fault):
    outcome = setting.run(name, fault=fault)
    assert outcome.codes == [CODES[fault.action]]
    assert "the same command resumes this run" in outcome.output
    last = flat_state(setting.directory / name / "last")["/state/step"]
    assert last == fault.step + (fault.place in ("state", "renamed"))  # the step in progress is finished
    again = setting.run(name)
    assert again.codes == [0], again.output
    assert f", step {last}" in again.output
    assert_same(setting.directory / name, setting.reference())


@pytest.mark.parametrize(
    ("fault", "parallel"),
    [
        (Fault("sigterm", "step", 5, rank=1), "ddp"),
        slow(Fault("sigint", "validation", 4, rank=1), "ddp"),
        slow(Fault("sigterm", "step", 5, rank=1), "fsdp"),
        slow(Fault("sigint", "validation", 4, rank=1), "fsdp"),
    ],
    ids=show,
)
def test_signal_to_one_rank_stops_all_ranks(setting, name, fault, parallel):
    outcome = setting.run(name, 2, fault, parallel=parallel)
    assert outcome.codes == [CODES[fault.action]] * 2, outcome.output
    assert setting.run(name, 2, parallel=parallel).codes == [0, 0]
    assert_same(setting.directory / name, setting.reference(2, parallel=parallel))


def test_repeated_sigterm_during_validation(setting, name):
    for _ in range(2):
        outcome = setting.run(name, fault=Fault("sigterm", "validation", 8))
        assert outcome.codes == [143]
    again = setting.run(name)
    assert not re.search(r"epoch 2/4 stage \d: +[1-9]", again.output)  # no step of the second epoch is trained again
    assert_same(setting.directory / name, setting.reference())


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_signal_exits_without_saving(setting, name):
    outcome = setting.run(name, fault=Fault("impatient", "step", 6))
    assert outcome.codes == [143]
    assert "resumes this run" not in outcome.output
    assert os.readlink(setting.directory / name / "last") == "checkpoint_1"  # after step 4; nothing was saved since
    assert setting.run(name).codes == [0]
    assert_same(setting.directory / name, setting.reference())


# --- non-finite loss and gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "parallel"), [slow(1, "ddp"), (2, "ddp"), slow(2, "fsdp")])
def test_nan_loss_stops_all_ranks_before_optimizer_step(setting, name, ranks, parallel):
    fault = Fault("nan", "forward", 4, rank=ranks - 1)
    outcome = setting.run(name, ranks, fault, parallel=parallel)
    assert outcome.codes == [3] * ranks
    run, epoch = setting.directory / name, 1 if ranks == 1 else 2
    [message] = re.findall(r"error: (.*)", outcome.output)
    assert f"epoch {epoch}, step 4: loss nan" in message
    idx = [int(number) for number in re.findall(r"\d+", message.split("training problems")[1].split(";")[0])]
    assert idx == step_indices(setting, epoch - 1, range(12, 14) if ranks == 1 else range(8, 14), ranks)
    assert all(verify_manifest(path) is None for path in list_checkpoints(run))
    assert os.readlink(run / "last") == ("checkpoint_0_step_3" if ranks == 1 else "checkpoint_1_step_3")
    assert setting.run(name, ranks, parallel=parallel).codes == [0] * ranks
    assert_same(run, setting.reference(ranks, parallel=parallel))


@pytest.mark.parametrize("step", [3, 7])  # before the first checkpoint; after checkpoint_1_step_6
def test_words_in_the_message_of_a_nan_loss_train_on(setting, name, step):
    """A lower lr alone would be refused on resume."""
    outcome = setting.run(name, fault=Fault("nan", "forward", step), save_every_steps=3)
    [words] = re.findall(r"train on more cautiously: (.*)", outcome.output)
    changes = dict(word.split("=", 1) for word in shlex.split(words))
    run = setting.directory / changes.setdefault("name", name)
    assert changes["lr"] == "0.001" and changes["max_grad_norm"] == "1.0"
    again = setting.run(**changes)
    assert again.codes == [0], again.output
    assert [line["eval/epoch"] for line in metrics(run) if "eval/epoch" in line] == [1, 2, 3, 4][step // 4 :]
    if step == 7:
        assert changes["load_model_path"] == str(setting.directory / name / "checkpoint_1_step_6")
        assert run.name == f"{name}_from_checkpoint_1_step_6"


def test_inf_gradient_on_one_rank_stops_all_ranks(setting, name):
    outcome = setting.run(name, 2, Fault("inf", "backward", 4, rank=1))
    assert outcome.codes == [3, 3]
    assert re.search(r"error: epoch 2, step 4: loss \d.*, gradient norm .*, on the training problems", outcome.output)
    assert setting.run(name, 2).codes == [0, 0]
    assert_same(setting.directory / name, setting.reference(2))


def step_indices(setting: Setting, epoch: int, places: range, ranks: int) -> list[int]:
    """The problems at the given places of a shuffled epoch, in the order of ranks and micro-batches."""
    order = list(range(14))
    random.Random(f"order 0 {epoch}").shuffle(order)
    return [order[i] for rank in range(ranks) for i in itertools.chain(*step_batches(places, 2, 2, rank, ranks)[0][1])]


# --- damaged and missing files ----------------------------------------------------------------------------------------


def stopped(setting: Setting, name: str, step: int = 11, **changes) -> Path:
    """The directory of a run that was stopped by SIGTERM in an optimizer step."""
    assert setting.run(name, fault=Fault("sigterm", "step", step), **changes).codes == [143]
    return setting.directory / name


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (truncate, "training_state.pt"),
        (flip, "optimizer.safetensors"),
        slow(truncate, "model.safetensors"),
        (flip, "model.safetensors"),
        slow(flip, "training_state.pt"),
        slow(flip, "coconut.json"),
        slow(missing, "tokenizer.json"),
        (missing, "manifest.json"),
        slow(empty, "manifest.json"),
    ],
)
def test_damaged_checkpoint_is_skipped_on_resume(setting, name, harm, file):
    run = stopped(setting, name)
    newest, before = list_checkpoints(run)[:2]
    assert [newest.name, before.name] == ["checkpoint_2_step_11", "checkpoint_2_step_9"]
    harm(newest / file)
    again = setting.run(name)
    assert again.codes == [0], again.output
    [warning] = re.findall(r"warning: (?!max_new_tokens).*", again.output)
    assert str(newest) in warning and file in warning
    assert ", step 9" in again.output
    assert_same(run, setting.reference())


def test_resume_without_optimizer_state_warns(setting, name):
    run = stopped(setting, name, reset_optimizer=False)
    *newest, slim = list_checkpoints(run)[:3]
    assert not (slim / "optimizer.safetensors").exists() and verify_manifest(slim) is None
    for checkpoint in newest:
        flip(checkpoint / "optimizer.safetensors")
    again = setting.run(name, reset_optimizer=False)
    assert again.codes == [0], again.output
    assert f"warning: {slim} has no optimizer state (only the newest 2 do)" in again.output
    assert ", step 8" in again.output
    finished, reference = metrics(run), metrics(setting.reference(reset_optimizer=False))
    assert [line["step"] for line in finished] == [line["step"] for line in reference]
    assert finished[:10] == reference[:10] and finished != reference  # up to step 8, and from there on


@pytest.mark.slow
def test_run_starts_from_scratch_when_all_checkpoints_are_damaged(setting, name):
    run = stopped(setting, name, 5)
    for checkpoint in list_checkpoints(run):
        flip(checkpoint / "model.safetensors")
    again = setting.run(name)
    assert again.codes == [0]
    assert "no complete checkpoint left; training starts from scratch" in again.output
    assert_same(run, setting.reference())


def test_retention_does_not_count_damaged_checkpoints(setting, name):
    run = stopped(setting, name)
    flip(list_checkpoints(run)[0] / "model.safetensors")
    assert setting.run(name, fault=Fault("sigterm", "step", 10), keep_checkpoints=2).codes == [143]
    sound = [path.name for path in list_checkpoints(run) if verify_manifest(path) is None]
    assert sound == ["checkpoint_2_step_10", "checkpoint_2_step_9", "checkpoint_1"]  # the last one is best


@pytest.mark.slow
def test_missing_best_and_last_links_are_restored(setting, name):
    run = stopped(setting, name)
    before = [os.readlink(run / link) for link in ("best", "last")]
    (run / "best").unlink()
    (run / "last").unlink()
    assert setting.run(name, fault=Fault("kill", "step", 12)).codes == [-9]
    assert [os.readlink(run / link) for link in ("best", "last")] == before
    assert setting.run(name).codes == [0]
    assert_same(run, setting.reference())


def test_partial_checkpoint_is_removed_on_resume(setting, name):
    run = stopped(setting, name)
    (run / "checkpoint_7.partial").mkdir()
    (run / "checkpoint_7.partial" / "model.safetensors").write_bytes(b"torn")
    (run / "best.partial").symlink_to("checkpoint_7")
    (run / "config.yaml.partial").write_text("na")
    assert setting.run(name).codes == [0]
    assert_same(run, setting.reference())


@pytest.mark.parametrize("kept", [slow(0), 3.5])
def test_truncated_metrics_file_is_reported_on_resume(setting, name, kept):
    run = stopped(setting, name)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lost = lines[int(kept) :]
    (run / "metrics.jsonl").write_text(
        "".join(f"{line}\n" for line in lines[: int(kept)]) + (lost[0][:9] if kept % 1 else "")
    )
    again = setting.run(name)
    assert again.codes == [0]
    assert "metrics.jsonl lacks lines" in again.output
    assert metrics(run) == metrics(setting.reference())[: int(kept)] + metrics(setting.reference())[len(lines) :]


def test_concurrent_run_in_the_same_directory_is_refused(setting, name):
    run = stopped(setting, name)
    (run / "last").unlink()  # the other start must not set it again
    with (run / "metrics.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the process does that trains there
        before = snapshot(run)
        outcome = setting.run(name, 2)
        assert outcome.codes == [2, 2]
        assert f"error: name: another process is training in {run}" in outcome.output
        assert snapshot(run) == before
    assert setting.run(name).codes == [0]
    assert_same(run, setting.reference())


@pytest.mark.slow
def test_resume_key_is_ignored_when_a_checkpoint_exists(setting, name):
    assert setting.run(name, fault=Fault("kill", "step", 6), resume=1).codes == [-9]
    again = setting.run(name, resume=1)
    assert again.codes == [0]
    assert "resume is ignored" in again.output
    assert_same(setting.directory / name, setting.reference(resume=1))
    assert [line["eval/epoch"] for line in metrics(setting.directory / name) if "eval/epoch" in line] == [2, 3, 4]


# --- full or read-only disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "ranks"),
    [
        slow(Fault("full", "state", 8), 1),
        (Fault("full", "state", 4), 2),
        (Fault("full", "moments", 4), 2),
        slow(Fault("full", "rename", 8), 1),
        slow(Fault("full", "log", 6), 2),
        (Fault("limit", "step", 8, limit=40_000), 1),  # the weights do not fit any more
    ],
    ids=show,
)
def test_full_disk_exits_with_code_4_and_keeps_checkpoints(setting, name, fault, ranks):
    outcome = setting.run(name, ranks, fault)
    run = setting.directory / name
    assert outcome.codes == [4] * ranks, outcome.output
    [message] = re.findall(r"error: (.*)", outcome.output)
    assert str(run) in message and ("No space left" in message or "File too large" in message)
    assert "Traceback" not in outcome.output
    assert not list(run.glob("*.partial"))  # the room is given back
    assert list_checkpoints(run) and all(verify_manifest(path) is None for path in list_checkpoints(run))
    assert setting.run(name, ranks).codes == [0] * ranks
    assert_same(run, setting.reference(ranks))


def test_run_directory_that_cannot_be_created_is_refused(setting, name):
    (setting.directory / name).write_text("a file in its place")
    outcome = setting.run(name, 2)
    assert outcome.codes == [2, 2]
    assert f"error: save_path: {setting.directory / name} is a file where a directory is needed" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes in read-only directories")
def test_read_only_run_directory_is_refused(setting, name):
    run = stopped(setting, name)
    before = snapshot(run)
    run.chmod(0o500)
    try:
        outcome = setting.run(name)
    finally:
        run.chmod(0o700)
    assert outcome.codes == [2]
    assert f"error: save_path: {run} cannot be written by this user" in outcome.output
    assert snapshot(run) == before


# --- another number of ranks ------------------------------------------------------------------------------------------


def test_remaining_problems_are_redistributed_over_another_number_of_ranks(setting, name):
    stopped(setting, name, 6)  # two steps of the second epoch: 8 of 14 problems
    outcome = setting.run(name, 2, Fault("nan", "forward", 7))
    assert outcome.codes == [3, 3]
    assert "saved by 1 processes, so the random streams are seeded anew" in outcome.output
    [listed] = re.findall(r"training problems (\[\[.*?\]\])", outcome.output)
    idx = [int(number) for number in re.findall(r"\d+", listed)]
    assert idx == step_indices(setting, 1, range(8, 14), 2)
    assert setting.run(name, 3).codes == [0] * 3
    steps = [(line["train/epoch"], line["step"]) for line in metrics(setting.directory / name) if "train/loss" in line]
    epochs = [1] * 4 + [2] * 3 + [3] * 2 + [4] * 2  # 6 problems are left for one step, then 14 for two of 12 and 2
    assert steps == list(zip(epochs, range(1, 12), strict=True))


# --- started by python and by torchrun --------------------------------------------------------------------------------

DRIVER = ROOT / "tests" / "helpers" / "faults.py"


def command(setting: Setting, name: str, fault: Fault, *torchrun: str) -> list[str]:
    """The command line of a run with a fault, by python or torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else []
    return [sys.executable, *launcher, str(DRIVER), json.dumps(asdict(fault)), *setting.words(name)]


def start(words: list[str]) -> subprocess.Popen:
    """Starts a command with stdout and stderr in one pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)


def signal_when_struck(setting: Setting, name: str, number: int, *torchrun: str) -> tuple[int, str]:
    """Sends a signal to a run, or to its torchrun agent, in optimizer step 6; returns the exit code and the output."""
    struck = setting.directory / f"{name}.struck"
    with start(command(setting, name, Fault("wait", "step", 6, once=str(struck)), *torchrun)) as process:
        for _ in range(1200):
            if struck.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(number)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_code_on_sigterm_and_sigint(setting, name, number, code):
    returned, output = signal_when_struck(setting, name, number)
    assert returned == code, output
    assert "stopped by a signal; the same command resumes this run" in output
    finished = run_script(setting.config, *setting.words(name)[1:])
    assert finished.returncode == 0, finished.stderr
    assert_same(setting.directory / name, setting.reference())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_forwards_sigterm(setting, name):
    returned, output = signal_when_struck(setting, name, signal.SIGTERM, "--nproc_per_node", "2")
    assert returned != 0
    assert "stopped by a signal; the same command resumes this run" in output
    assert flat_state(setting.directory / name / "last")["/state/step"] == 6
    finished = run_script(setting.config, *setting.words(name)[1:], processes=2)
    assert finished.returncode == 0, finished.stderr
    assert_same(setting.directory / name, setting.reference(2))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_restarts_and_resumes_after_a_worker_dies(setting, name):
    fault = Fault("kill", "backward", 6, rank=1, once=str(setting.directory / f"{name}.struck"))
    with start(command(setting, name, fault, "--nproc_per_node", "2", "--max-restarts", "1")) as process:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert Path(fault.once).exists() and "resuming" in output
    assert_same(setting.directory / name, setting.reference(2))


@pytest.mark.slow
def test_wandb_run_id_is_kept_on_resume(setting, name):
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for fault, code in ((Fault("sigterm", "step", 6), 143), (None, 0)):
        outcome = launch(setting.words(name, logger="wandb"), fault=fault, env=env)
        assert outcome.codes == [code], outcome.output
    runs = [path.name.rsplit("-", 1)[1] for path in (setting.directory / name / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1


# --- GPU memory, hanging ranks, shared filesystems, wandb -------------------------------------------------------------

STEP_KEYS = ["batch_size_training", "gradient_accumulation_steps", "gradient_checkpointing"]


@pytest.mark.parametrize(
    ("fault", "ranks", "keys"),
    [
        slow(Fault("oom", "step", 6, rank=1), 2, STEP_KEYS),
        slow(Fault("oom", "optimizer", 6), 1, STEP_KEYS),
        (Fault("oom", "validation", 8), 1, ["batch_size_eval", "max_new_tokens"]),
        slow(Fault("oom", "validation", 4, rank=1), 2, ["batch_size_eval", "max_new_tokens"]),
    ],
    ids=show,
)
def test_gpu_out_of_memory_names_keys_to_lower_and_keeps_checkpoints(setting, name, fault, ranks, keys):
    outcome = setting.run(name, ranks, fault)
    assert outcome.codes == [5 if rank == fault.rank else 6 for rank in range(ranks)], outcome.output
    [message] = re.findall(r"error: out of GPU memory: (.*)", outcome.output)
    assert message.startswith(f"rank {fault.rank} on ") and all(key in message for key in keys)
    assert "Checkpoints are intact" in message and "Traceback" not in outcome.output
    run = setting.directory / name
    assert list_checkpoints(run) and all(verify_manifest(path) is None for path in list_checkpoints(run))
    assert setting.run(name, ranks).codes == [0] * ranks
    assert_same(run, setting.reference(ranks))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_hanging_rank_is_reported_by_all_ranks(setting, name, parallel):
    outcome = setting.run(name, 2, Fault("hang", "step", 6, rank=1, limit=6), parallel=parallel)
    assert outcome.codes == [6, 6], outcome.output
    stands = r"warning: rank {} on \S+: no collective for 1 s; it is in .*main > run > .*fit > train_epoch"
    assert all(re.search(stands.format(rank), outcome.output) for rank in range(2)), outcome.output
    [first, *_] = re.findall(r"error: lost another rank, see its own message: (.*)", outcome.output)
    assert first.startswith("rank 0 on ") and "train_epoch" in first
    assert "Traceback" not in outcome.output
    assert setting.run(name, 2, parallel=parallel).codes == [0, 0]
    assert_same(setting.directory / name, setting.reference(2, parallel=parallel))


@pytest.mark.slow
def test_save_may_take_longer_than_a_collective(setting, name):
    outcome = setting.run(name, 2, Fault("hang", "moments", 2, limit=6))
    assert outcome.codes == [0, 0], outcome.output
    assert_same(setting.directory / name, setting.reference(2))


@pytest.mark.parametrize("started", [slow(False), True])
def test_rank_that_does_not_see_save_path_stops_all_ranks(setting, name, started):
    run = setting.directory / name
    if started:
        assert setting.run(name, 2, Fault("sigterm", "step", 6)).codes == [143, 143]
    outcome = setting.run(name, 2, Fault("unseen", rank=1, limit=1000))
    assert outcome.codes == [2, 2], outcome.output
    file = run / ("last/manifest.json" if started else "config.yaml")
    messages = re.findall(r"error: (save_path: rank 1 on \S+ waited 3 s for .*)", outcome.output)
    assert messages and f"{file.resolve()}, which is missing there" in messages[0]
    assert "step/s" not in outcome.output  # no step was trained
    assert setting.run(name, 2).codes == [0, 0]
    assert_same(run, setting.reference(2))


def test_delayed_writes_on_a_shared_filesystem_are_waited_for(setting, name):
    assert setting.run(name, 2, Fault("sigterm", "step", 6)).codes == [143, 143]
    outcome = setting.run(name, 2, Fault("unseen", rank=1, limit=2))
    assert outcome.codes == [0, 0], outcome.output
    assert_same(setting.directory / name, setting.reference(2))


def test_clock_skew_does_not_affect_resume(setting, name):
    """The newest checkpoint has the oldest mtimes, as if the others came from a node whose clock is ahead."""
    run = stopped(setting, name)
    for age, checkpoint in enumerate(list_checkpoints(run)):
        for path in (*checkpoint.iterdir(), checkpoint):
            os.utime(path, (4e9 * (age + 1) / 10,) * 2)  # from 1982 on; some lie in the future
    os.utime(run / "metrics.jsonl", (0, 0))
    again = setting.run(name)
    assert again.codes == [0] and ", step 11" in again.output, again.output
    assert_same(run, setting.reference())


@pytest.mark.parametrize("fails", [slow("login"), "init", "log", slow("finish")])
def test_training_continues_when_wandb_fails(setting, name, fails, monkeypatch, capsys):
    """A stub of wandb raises at login, at init, in the middle of a run or at its end."""
    wandb = ModuleType("wandb")
    wandb.__spec__, wandb.Table = ModuleSpec("wandb", None), dict
    calls = Counter()

    def call(function, *_, **__):
        calls[function] += 1
        if function == fails and (function != "log" or calls[function] > 5):
            raise ConnectionError("the network is down")
        return wandb

    for function in ("login", "init", "log", "finish"):
        setattr(wandb, function, partial(call, function))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run.main(setting.words(name, logger="wandb")) == 0
    assert "warning: wandb failed (the network is down); the run continues" in capsys.readouterr().out
    assert calls["log"] == {"login": 0, "init": 0, "log": 6, "finish": 26}[fails]
    assert_same(setting.directory / name, setting.reference())
