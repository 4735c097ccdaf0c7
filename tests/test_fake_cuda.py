"""The whole program on a GPU that does not exist: it computes what it does on a CPU, and where it waits for the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import coconut
import run
from coconut import Coconut
from helpers import tiny_gpt2
from helpers.batches import BATCHES, align, batch_of, wrap
from helpers.fake_cuda import can_fake_gpu, fake_gpu, pin
from helpers.setting import Setting, metrics

pytestmark = pytest.mark.skipif(not can_fake_gpu(), reason="needs a torch without CUDA, and g++")

ROOT = Path(run.__file__).parent
EPOCHS, STEPS, BATCHES_OF_ANSWERS, TOKENS = 2, 8, 6, 4
ONCE = ("parallelize", "full_tensors", "merge_adapters", "frozen_checksum")  # the start, and checkpoints
GATHER = "all_gather_totals > all_gather_scalars"


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    """Two stages of one epoch of four optimizer steps; without dropout, whose masks depend on the device."""
    setting = Setting(tmp_path_factory.mktemp("gpu"), dropout=0.0)
    setting.values |= {"num_epochs": EPOCHS, "epochs_per_stage": 1, "save_every_steps": None}
    return setting


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="float32"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"gradient_checkpointing": "block"}, id="block", marks=pytest.mark.slow),
        pytest.param({"lora_rank": 2, "bf16": True}, id="lora", marks=pytest.mark.slow),
    ],
)
def test_run_on_a_gpu_equals_one_on_a_cpu_and_waits_once_per_step(setting, changes):
    name = "-".join(changes) or "plain"
    assert run.main(setting.words(name + "-cpu", **changes)) == 0
    with fake_gpu(setting.directory, ROOT) as gpu:
        assert run.main(setting.words(name, data_workers=0, **changes)) == 0
    for mine, theirs in zip(*(metrics(setting.directory / n) for n in (name, name + "-cpu")), strict=True):
        assert mine == pytest.approx(theirs, rel=0.2 if "bf16" in changes else 1e-4)
    waits = {key: count for key, count in gpu.waits.items() if not any(place in key[0] for place in ONCE)}
    # The counts of tokens go along from ordinary memory: a few bytes, copied at once, just before the wait.
    assert waits.pop((GATHER, "from memory that is not pinned")) == STEPS + EPOCHS
    assert waits == {
        (GATHER, "to the CPU"): STEPS + EPOCHS,  # one per step, and one before the first of an epoch
        ("validate > mean_loss", "_local_scalar_dense"): EPOCHS,
        ("predict_all > generate", "nonzero"): BATCHES_OF_ANSWERS * TOKENS,
        ("validate > predict_all", "to the CPU"): BATCHES_OF_ANSWERS,
    }
    assert set(gpu.attention) == {"efficient"}


# --- what the fake would miss otherwise -------------------------------------------------------------------------------


def step(move=lambda tensor: pin(tensor).to("cuda", non_blocking=True), bf16: bool = False) -> None:
    """Run a training step of a tiny Coconut, with a batch that is moved by `move`."""
    model = wrap(tiny_gpt2()).to("cuda")
    rows = BATCHES["mixed"]
    batch = batch_of(rows, align(rows))
    plan = coconut.plan_batch(**batch, latent_token_id=model.latent_token_id).pin_memory()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
        loss = model(**{key: move(tensor) for key, tensor in batch.items()}, plan=plan).loss
    loss.backward()


def waits_of(folder: Path, **options) -> set[str]:
    """The reasons why a step waits, without those of moving the model."""
    with fake_gpu(folder, ROOT) as gpu:
        step(**options)
    return {reason for (place, reason) in gpu.waits if place}


def test_correct_step_does_not_wait(setting):
    assert waits_of(setting.directory) == set()


@pytest.mark.parametrize(
    ("bug", "reason"),
    [
        (lambda state: state * state.sum().item(), "_local_scalar_dense"),
        (lambda state: state if (state > 0).any() else -state, "_local_scalar_dense"),
        (lambda state: state + state[state > 0].sum(), "index by a mask"),
        (lambda state: state[torch.arange(len(state))], "index from the CPU"),
        (lambda state: state + torch.ones(state.shape).to("cuda"), "to the GPU"),
        (lambda state: state + torch.ones(state.shape).to("cuda", non_blocking=True), "from memory that is not pinned"),
        (lambda state: state + state.detach().cpu().sum(), "to the CPU"),
    ],
)
def test_planted_wait_is_counted(setting, monkeypatch, bug, reason):
    monkeypatch.setattr(Coconut, "thought", lambda self, state, number: bug(state))
    assert waits_of(setting.directory) == {reason}


@pytest.mark.parametrize(
    ("bug", "error"),
    [
        (lambda state: state + torch.ones(state.shape), RuntimeError),
        (lambda state: torch.from_numpy(state.detach().numpy()), TypeError),
    ],
)
def test_planted_use_of_two_devices_is_refused(setting, monkeypatch, bug, error):
    monkeypatch.setattr(Coconut, "thought", lambda self, state, number: bug(state))
    with pytest.raises(error, match="device"):
        waits_of(setting.directory)


def test_planted_mask_in_another_dtype_or_unaligned_is_noted(setting, monkeypatch):
    make = coconut.causal_mask
    bugs = [lambda mask, n, dtype: make(mask, n, torch.float32), lambda *args: make(*args).contiguous()]
    for bug in bugs:
        monkeypatch.setattr(coconut, "causal_mask", bug)
        with fake_gpu(setting.directory, ROOT) as gpu:
            step(bf16=True)
        assert "efficient, copy" in gpu.attention
