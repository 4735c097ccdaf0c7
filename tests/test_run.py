"""End-to-end runs of tiny models: the files of a run, resume, retention, only_eval, several ranks, loggers."""

import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run
import train
from components import checkpoint_manager, files
from components import metrics as metrics_module
from components.checkpoint import check_same_training, find_checkpoint
from components.checkpoint_manager import list_checkpoints
from components.data_sources import content_digest
from components.distributed import Processes
from components.errors import Interrupted
from components.export import describe
from components.files import file_digest, verify_manifest
from config import UserError, load_config, read_yaml
from evaluate import Evaluation, Validator, open_checkpoint
from helpers import (
    REPOSITORY,
    byte_tokenizer,
    make_problems,
    read_lines,
    run_script,
    save_model,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    training_state,
    words,
    write_json,
)
from helpers.faults import flip
from helpers.setting import assert_same as assert_same_runs
from utils import StopRequest, set_seed

STEPS = 5  # optimizer steps per epoch: 17 problems in batches of 4
CHECKPOINT_FILES = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
CHECKPOINT_FILES |= {"coconut.json", "training_state.pt", "optimizer.safetensors"}
CHECKPOINT_FILES |= {"manifest.json", "generation_config.json", "custom_generate/generate.py"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with two models (dropout 0 and 0.1), data and a config: coconut with a stage switch after epoch 2."""
    world = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    for name, dropout in (("plain", 0.0), ("dropout", 0.1)):
        save_model(world / name, tiny_gpt2(len(byte_tokenizer()), 64, dropout))
    config = {"save_path": str(world / "runs"), "model_id": str(world / "dropout"), "logger": "none"}
    config |= {"train_path": write_json(world / "train.json", make_problems(11) + make_problems(6, steps=3, seed=3))}
    problems = make_problems(4, seed=1) + make_problems(3, steps=3, seed=2)
    config |= {"val_path": write_json(world / "valid.json", problems)}
    config |= {"method": "coconut", "max_latent_stage": 2, "epochs_per_stage": 2, "pad_latent_to_max": False}
    config |= {"batch_size_training": 4, "lr": 3e-3, "max_new_tokens": 5}
    (world / "config.yaml").write_text(yaml.safe_dump(config))
    return world


def start(world, *overrides, code=0, **values):
    """Calls run.main in this process and returns the run directory."""
    assert run.main([str(world / "config.yaml"), *overrides, *words(values)]) == code
    return world / "runs" / values["name"]


def start_real(world, *overrides, processes=0, env=None, **values):
    """Starts run.py by python or torchrun and returns the run directory and the output."""
    finished = run_script(world / "config.yaml", *overrides, *words(values), processes=processes, cwd=world, env=env)
    assert finished.returncode == 0, finished.stderr
    return world / "runs" / values["name"], finished.stdout + finished.stderr


TIMES = ("train/tokens_per_second", "eval/seconds")


def files_in(directory):
    """The relative paths of all files under a directory."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def metrics(directory, prefix="", drop=TIMES):
    """The lines of metrics.jsonl with keys of a prefix, without timings."""
    lines = [line for line in read_lines(directory / "metrics.jsonl") if any(key.startswith(prefix) for key in line)]
    return [{key: value for key, value in line.items() if key not in drop} for line in lines]


def losses(directory):
    return [line["train/loss"] for line in metrics(directory, "train/")]


def assert_same(a, b):
    """Two nested values are bit-identical."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def assert_same_run(one, other, epoch):
    """Weights, optimizer state, random states, metrics (without timings) and predictions of two runs are identical."""
    assert_same(load_file(one / "last" / "model.safetensors"), load_file(other / "last" / "model.safetensors"))
    first, second = (training_state(directory / f"checkpoint_{epoch}") for directory in (one, other))
    for state in (first, second):
        assert state["state"].pop("run_id")
        assert state["state"].pop("metrics_bytes")
    assert_same(first, second)
    assert metrics(one) == metrics(other)
    for number in range(1, epoch + 1):
        name = f"predictions_{number}.jsonl"
        assert (one / name).read_bytes() == (other / name).read_bytes()


# --- files of a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world):
    """An uninterrupted run of 3 epochs: stage 0 twice, then stage 1."""
    return start(world, name="whole", num_epochs=3)


def test_run_directory_contents(whole):
    numbered = {f"{name}_{i}{end}" for name, end in (("checkpoint", ""), ("predictions", ".jsonl")) for i in (1, 2, 3)}
    assert {path.name for path in whole.iterdir()} == numbered | {"config.yaml", "metrics.jsonl", "best", "last"}
    for i in (1, 2, 3):
        files = CHECKPOINT_FILES - ({"optimizer.safetensors"} if i == 1 else set())  # the newest two have it
        assert files_in(whole / f"checkpoint_{i}") == files
    assert os.readlink(whole / "last") == "checkpoint_3"


def test_saved_config_round_trips_and_records_versions(world, whole):
    config = load_config(whole / "config.yaml")
    assert config == load_config(world / "config.yaml", ["name=whole", "num_epochs=3"])
    comments = [line for line in (whole / "config.yaml").read_text().splitlines() if line.startswith("# ")]
    assert [line.split()[1] for line in comments] == ["python", "torch", "transformers", "commit", "device", "run"]


def test_metrics_file_has_one_line_per_step_and_validation(whole):
    lines = read_lines(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 15]
    steps = [line for line in lines if "train/loss" in line]
    keys = {"epoch", "step", "stage", "loss", "grad_norm", "lr", "tokens_per_second"}
    assert all(set(line) == {"step", *(f"train/{key}" for key in keys)} for line in steps)
    assert [line["train/epoch"] for line in steps] == [1] * STEPS + [2] * STEPS + [3] * STEPS
    assert [line["train/stage"] for line in steps] == [0] * 2 * STEPS + [1] * STEPS
    validations = [line for line in lines if "eval/loss" in line]
    assert [line["eval/epoch"] for line in validations] == [1, 2, 3]
    assert [line["eval/stage"] for line in validations] == [0, 0, 1]
    assert all(0 <= line["eval/acc"] <= 1 for line in validations)
    assert not any("eval/cot_em" in line for line in validations)


def test_training_loss_decreases(whole):
    assert sum(losses(whole)[STEPS : 2 * STEPS]) < 0.9 * sum(losses(whole)[:STEPS])


def test_model_overfits_four_problems(world):
    few = write_json(world / "few.json", make_problems(4))
    options = {"train_path": few, "val_path": few, "model_id": world / "plain", "lr": 0.01}
    options |= {"save_only_improve": True, "max_new_tokens": 8}
    directory = start(world, name="heart", epochs_per_stage=20, num_epochs=60, **options)
    assert [line["eval/acc"] for line in metrics(directory, "eval/")][-1] == 1
    assert losses(directory)[-1] < 0.1
    texts = [line["generated"] for line in read_lines(directory / "predictions_60.jsonl")]
    assert all(text.startswith("[2 thoughts]### ") for text in texts)


def test_prediction_files_list_each_validation_problem_once(world, whole):
    for i in (1, 2, 3):
        lines = read_lines(whole / f"predictions_{i}.jsonl")
        assert [line["idx"] for line in lines] == list(range(7))
        keys = {"idx", "question", "expected", "generated", "answer", "correct", "new_tokens"}
        assert {key for line in lines for key in line} == keys
        assert all(line["generated"].startswith("[1 thought]") == (i == 3) for line in lines)
        [accuracy] = [line["eval/acc"] for line in metrics(whole, "eval/") if line["eval/epoch"] == i]
        assert accuracy == sum(line["correct"] for line in lines) / 7


def test_schedule_is_printed_at_start(world, capsys):
    start(world, name="printed", num_epochs=3)
    printed = capsys.readouterr().out
    rows = [line.split(maxsplit=3) for line in printed.splitlines()]
    assert ["1-2", "0", "0", "all"] in rows
    assert ["3-3", "1", "1", "all but the first 1"] in rows
    assert (
        f"coconut · printed · gpt2 2x16 (0.0M) · 1 x CPU ({platform.machine()}, threads: 1) · 17 train / 7 valid"
        in printed
    )
    assert "changed: name=printed num_epochs=3" in printed
    assert "gradient_accumulation_steps" not in printed and "expected" not in printed
    [last] = re.findall(r"^epoch 3  stage 1 .* (checkpoint_3, best of stage 1)$", printed, re.MULTILINE)
    assert f"({last.split(',')[0]})\n  ask:   python scripts/ask.py {world}/runs/printed/best" in printed


def test_verbose_and_samples_print_config_and_answers(world, capsys):
    start(world, name="talkative", num_epochs=1, verbose=True, samples=2)
    printed = capsys.readouterr().out
    assert "gradient_accumulation_steps: 1\n" in printed
    assert printed.count("    expected ") == 2


@pytest.mark.parametrize(
    "method",
    ["cot", "no_cot", "icot", "pause_token", "coconut", "no_curriculum", "no_thoughts", "pause_as_thought"],
)
def test_every_method_trains_and_evaluates(world, method):
    directory = start(world, name=f"method_{method}", method=method, num_epochs=3, epochs_per_stage=1)
    assert len(losses(directory)) == 3 * STEPS
    assert all(("eval/cot_em" in line) == (method == "cot") for line in metrics(directory, "eval/"))
    again = start(world, name="again", method=method, only_eval=True, load_model_path=directory / "last")
    [summary] = (again / "eval_checkpoint_3").glob("metrics_valid*.yaml")
    found = yaml.safe_load(summary.read_text())
    shutil.rmtree(again)
    [*_, trained] = metrics(directory, "eval/")
    assert found["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)
    assert (found["stage"], found["eval/acc"]) == (trained["eval/stage"], trained["eval/acc"])


def test_bf16_keeps_float32_weights_and_optimizer_state(world, whole):
    directory = start(world, name="bf16", num_epochs=2, bf16=True)
    assert {value.dtype for value in load_file(directory / "last" / "model.safetensors").values()} == {torch.float32}
    states = training_state(directory / "checkpoint_2")["optimizer"].values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    assert losses(directory) == pytest.approx(losses(whole)[: 2 * STEPS], rel=0.1)
    assert losses(directory) != losses(whole)[: 2 * STEPS]


@pytest.mark.slow
def test_compile_matches_eager_losses(world):
    counters = torch._dynamo.utils.counters
    counters.clear()
    # Stages 0 to 2: no thoughts, one, two. No batch has a single row, which would cause a recompilation.
    options = {"model_id": world / "plain", "num_epochs": 6, "batch_size_training": 9}
    plain = start(world, name="eager", **options)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = start(world, name="compiled", compile=True, **options)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    loss = [[line["eval/loss"] for line in metrics(directory, "eval/")] for directory in (compiled, plain)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-4)


@pytest.mark.slow
def test_compile_matches_eager_losses_with_bf16_llama(world):
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "initializer_range": 0.1}
    options = {
        "model_id": save_model(world / "llama", tiny_llama(len(byte_tokenizer()), **sizes)),
        "num_epochs": 3,  # stages 0 and 1
        "batch_size_training": 9,  # no single row, which would be compiled for anew
        "bf16": True,
    }
    runs = [start(world, name=f"llama_{compile}", compile=compile, **options) for compile in (False, True)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-2)
    assert losses(runs[0]) != losses(runs[1])  # it was compiled: bfloat16 is rounded elsewhere


@pytest.mark.slow
def test_compile_on_two_ranks_matches_eager_losses(world):
    options = {"model_id": world / "plain", "num_epochs": 3}  # stages 0 and 1
    plain = start(world, name="one_eager", batch_size_training=10, **options)
    compiled, _ = start_real(world, processes=2, name="two_compiled", batch_size_training=5, compile=True, **options)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_uniform_prob_does_not_affect_validation_metrics(world):
    options = {"lr": 1e-30, "num_epochs": 1, "resume": 0}  # too small to move a weight
    plain, mixed = (start(world, name=f"mix_{p}", uniform_prob=p, **options) for p in (0, 1))
    assert losses(plain) != losses(mixed)
    assert metrics(plain, "eval/") == metrics(mixed, "eval/")


def test_length_check_includes_uniform_prob_stages_for_training_only(world):
    plain, longer = {"question": "1+1", "answer": "2", "steps": []}, make_problems(1, steps=1)
    paths = {"train_path": write_json(world / "short.json", [plain])}
    paths["val_path"] = write_json(world / "longer.json", longer)
    start(world, name="room", uniform_prob=0.5, c_thought=60, num_epochs=1, **paths)
    paths["train_path"] = paths["val_path"]
    start(world, name="no_room", uniform_prob=0.5, c_thought=60, num_epochs=1, **paths, code=2)


def test_length_check_leaves_out_stages_that_resume_skips(world):
    long = {"question": "1+1", "answer": "2", "steps": ["1+1=2" * 12]}  # too long at stage 0 only
    paths = {"train_path": write_json(world / "long.json", [long]), "val_path": world / "short.json"}
    write_json(world / "short.json", [long | {"steps": ["2"]}])
    start(world, name="from_stage_1", num_epochs=3, resume=2, **paths)
    start(world, name="from_stage_0", num_epochs=3, **paths, code=2)


def test_each_epoch_is_shuffled_differently(world):
    directory = start(world, name="order", lr=1e-30, num_epochs=2, model_id=world / "plain")
    first, second = losses(directory)[:STEPS], losses(directory)[STEPS:]
    assert not set(first) & set(second)


def test_resume_key_skips_epochs_of_a_new_run(world):
    directory = start(world, name="skipped", resume=2, num_epochs=3)
    assert {line["train/epoch"] for line in metrics(directory, "train/")} == {3}
    assert {line["train/stage"] for line in metrics(directory, "train/")} == {1}
    assert os.readlink(directory / "last") == "checkpoint_3"


@pytest.mark.parametrize(("chosen", "limit", "threads"), [(None, 10**6, 1), ("2", 10**6, 2), (None, 0, 2)])
def test_small_model_takes_one_thread_unless_the_user_chose(world, monkeypatch, chosen, limit, threads):
    monkeypatch.setattr(run, "ONE_THREAD", limit)
    monkeypatch.setenv("OMP_NUM_THREADS", chosen or "")
    if not chosen:
        monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        start(world, name="threads", debug=True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_wait_policy_is_set_before_torch_is_imported_unless_the_user_did(tmp_path, chosen):
    (tmp_path / "torch.py").write_text("import os; raise SystemExit('policy ' + os.environ['OMP_WAIT_POLICY'])")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPOSITORY)!r}]; import run"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == f"policy {chosen or 'PASSIVE'}"


def test_debug_writes_no_files_and_limits_data(world, tmp_path, monkeypatch):
    before = snapshot(world)
    monkeypatch.chdir(tmp_path)
    assert run.main([str(world / "config.yaml"), "name=debug", "debug=True", "logger=wandb"]) == 0
    assert snapshot(world) == before
    assert list(tmp_path.iterdir()) == []
    many = write_json(tmp_path / "many.json", make_problems(5100))
    paths = [f"train_path={many}", f"val_path={many}"]
    config = load_config(world / "config.yaml", ["name=d", "debug=True", *paths])
    trainer = run.set_up(config, Processes(), StopRequest())
    assert (len(trainer.data), len(trainer.validator.examples)) == (5000, 32)


def test_gradient_checkpointing_of_a_part_that_blocks_lack_is_refused(world, tmp_path, capsys):
    model = save_model(tmp_path / "opt", tiny_opt(len(byte_tokenizer()), 64))
    before = snapshot(world)
    start(world, name="opt", model_id=model, gradient_checkpointing="mlp", code=2)
    assert "error: gradient_checkpointing: mlp: OPTDecoderLayer has no submodule" in capsys.readouterr().err
    assert snapshot(world) == before
    runs = [start(world, name=f"opt_{mode}", model_id=model, gradient_checkpointing=mode) for mode in ("block", False)]
    assert losses(runs[0]) == losses(runs[1])


def test_non_finite_loss_exits_with_code_3(world, capsys):
    directory = start(world, name="huge", lr=1e30, num_epochs=2, code=3)
    message = capsys.readouterr().err
    message = message[message.index("error: ") :]
    assert "epoch 1, step 2" in message
    assert "training problems" in message
    assert not list(directory.glob("checkpoint*"))


# --- resume -----------------------------------------------------------------------------------------------------------


def test_restarting_a_finished_run_changes_nothing(world, whole, capsys):
    before = snapshot(whole)
    start(world, name="whole", num_epochs=3)
    assert snapshot(whole) == before
    assert "raise num_epochs" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_with_raised_num_epochs_is_bit_identical(world, whole):
    """In separate processes, with dropout."""
    for epochs in (1, 3):
        directory, printed = start_real(world, name="parts", num_epochs=epochs)
        assert ("resuming" in printed) == (epochs > 1)
    assert_same_run(directory, whole, 3)


@pytest.fixture
def at_step(monkeypatch):
    """Calls a function after the backward pass of a given optimizer step."""
    backward = train.Trainer.backward

    def arrange(number, action):
        def patched(self, *arguments):
            result = backward(self, *arguments)
            if self.state.step + 1 == number:
                action()
            return result

        monkeypatch.setattr(train.Trainer, "backward", patched)

    yield arrange
    monkeypatch.setattr(train.Trainer, "backward", backward)


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path):
    """A shell reports a process that SIGINT ends as 130."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    ended = run_script("any.yaml", env={"PYTHONPATH": str(tmp_path)})
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("step", [3, STEPS, STEPS + 1, 2 * STEPS + 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_resume_after_sigterm_or_sigint_is_bit_identical(world, whole, at_step, monkeypatch, number, code, step):
    name = f"signal_{code}_{step}"
    with monkeypatch.context():
        at_step(step, lambda: os.kill(os.getpid(), number))
        directory = start(world, name=name, num_epochs=3, code=code)
        assert len(losses(directory)) == step
        at_step(0, None)
    start(world, name=name, num_epochs=3)
    assert_same_run(directory, whole, 3)


class CrashError(Exception):
    """Simulates a crash."""


def crash():
    raise CrashError


@pytest.mark.parametrize(("step", "left"), [(1, None), (4, "checkpoint_0_step_3"), (9, "checkpoint_1_step_6")])
def test_resume_after_crash_is_bit_identical(world, whole, at_step, step, left):
    name = f"crash_{step}"
    at_step(step, crash)
    with pytest.raises(CrashError):
        start(world, name=name, num_epochs=3, save_every_steps=3)
    directory = world / "runs" / name
    assert [path.name for path in directory.glob("last")] == ([] if left is None else ["last"])
    assert left is None or os.readlink(directory / "last") == left
    at_step(0, None)
    start(world, name=name, num_epochs=3, save_every_steps=3)
    assert_same_run(directory, whole, 3)


def test_links_that_a_crash_left_behind_are_set_back(world, copied):
    (copied / "best").unlink()
    (copied / "last").unlink()
    (copied / "last").symlink_to("checkpoint_2")
    start(world, name=copied.name, num_epochs=3)  # a finished run, which saves nothing
    assert [os.readlink(copied / link) for link in ("best", "last")] == ["checkpoint_3"] * 2


def test_save_every_steps_leaves_the_last_step_of_an_epoch_to_its_validation(world, monkeypatch):
    saved, save = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda path, *rest: saved.append(path.name) or save(path, *rest))
    start(world, name="often", num_epochs=2, save_every_steps=STEPS)
    assert saved == ["checkpoint_1", "checkpoint_2"]


def test_checkpoint_that_exists_is_not_written_again(world, monkeypatch):
    """A signal comes during a validation, and again during that of the resumed run."""

    def interrupt(validator, stage):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(Validator, "validate", interrupt)
    directory = start(world, name="twice", num_epochs=1, code=143)
    before = snapshot(directory / f"checkpoint_0_step_{STEPS}")
    assert before
    start(world, name="twice", num_epochs=1, code=143)
    assert snapshot(directory / f"checkpoint_0_step_{STEPS}") == before


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "training_state.pt", "coconut.json", "manifest.json"]
)
def test_truncated_checkpoint_file_is_skipped_on_resume(world, whole, file, capsys):
    directory = world / "runs" / f"damaged_{file}"
    shutil.copytree(whole, directory, symlinks=True)
    path = directory / "checkpoint_3" / file
    path.write_bytes(path.read_bytes()[:-9])
    start(world, name=directory.name, num_epochs=3)
    assert "skipping damaged checkpoint" in capsys.readouterr().out
    assert_same_run(directory, whole, 3)


def test_run_directory_without_checkpoint_starts_from_scratch(world, whole):
    directory = world / "runs" / "fresh"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    (directory / "config.yaml").write_text("lr: 7\n")
    start(world, name="fresh", num_epochs=3)
    assert_same_run(directory, whole, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", 0.5), ("method", "no_thoughts"), ("seed", 1), ("batch_size_training", 2), ("c_thought", 2)],
)
def test_changing_a_training_key_is_refused_on_resume(world, whole, capsys, key, value):
    before = snapshot(whole)
    start(world, f"{key}={value}", name="whole", num_epochs=5, code=2)
    printed, message = capsys.readouterr()
    assert f"- {key}: " in message
    assert str(value) in message
    assert "effective batch" not in printed  # nothing will be trained with it
    assert snapshot(whole) == before


def test_changing_data_or_model_is_refused_on_resume(world, whole, capsys, tmp_path):
    shutil.copytree(world / "plain", tmp_path / "model")
    other = write_json(tmp_path / "train.json", make_problems(17))
    start(world, name="whole", num_epochs=5, train_path=other, model_id=tmp_path / "model", code=2)
    message = capsys.readouterr().err
    assert "- train_path: " in message
    assert "- model_id: " in message


@pytest.mark.parametrize("change", ["gone", "moved", "taken out"])
def test_what_a_run_began_from_may_go_once_it_has_a_checkpoint(world, whole, tmp_path, capsys, change):
    shutil.copytree(world / "dropout", tmp_path / "model")
    shutil.copytree(whole / "checkpoint_3", tmp_path / "start")
    values = {"name": f"origin_{change}".replace(" ", "_"), "model_id": tmp_path / "model"}
    values["load_model_path"] = tmp_path / "start"
    directory = start(world, **values, num_epochs=1)
    for name in ("model", "start"):
        (tmp_path / name).rename(tmp_path / f"{name}_2")
    if change == "moved":
        values |= {"model_id": tmp_path / "model_2", "load_model_path": tmp_path / "start_2"}
    elif change == "taken out":
        values["load_model_path"] = None
    start(world, **values, num_epochs=1)  # a finished run
    start(world, **values, num_epochs=2)
    printed = capsys.readouterr().out
    assert ("note: load_model_path: " in printed) == (change != "gone")
    assert ("note: model_id: " in printed) == (change == "moved")
    assert read_yaml(directory / "config.yaml")["load_model_path"] == str(tmp_path / "start")
    assert verify_manifest(directory / "checkpoint_2") is None
    for path in list_checkpoints(directory):
        flip(path / "model.safetensors")
    start(world, **values | {"load_model_path": tmp_path / "start"}, num_epochs=2, code=2)
    assert f"load_model_path: '{tmp_path / 'start'}' does not exist" in capsys.readouterr().err


def test_changed_data_files_are_noticed_on_resume(world, tmp_path, capsys):
    """Training problems must be the same; other validation problems start best afresh."""
    values = {"name": "other_data", "val_path": tmp_path / "valid.json", "train_path": tmp_path / "train.json"}
    values |= {"epochs_per_stage": 3}  # one stage
    write_json(tmp_path / "train.json", make_problems(9))
    write_json(tmp_path / "valid.json", make_problems(3))
    directory = start(world, **values, num_epochs=1)
    before = snapshot(directory)
    write_json(tmp_path / "train.json", make_problems(8))
    start(world, **values, num_epochs=2, code=2)
    message = capsys.readouterr().err
    assert f"train_path: '{tmp_path / 'train.json'}' has changed" in message
    assert "it had 9 problems, and has 8 with another content now" in message
    assert snapshot(directory) == before
    write_json(tmp_path / "train.json", make_problems(9))
    start(world, **values, num_epochs=2)
    assert os.readlink(directory / "best") == "checkpoint_1"  # the same accuracy, 0, is no better
    assert "best starts anew" not in capsys.readouterr().out
    write_json(tmp_path / "valid.json", make_problems(4))
    start(world, **values, num_epochs=3)
    assert "best starts anew" in capsys.readouterr().out
    assert os.readlink(directory / "best") == "checkpoint_3"


def test_changing_other_keys_is_allowed_on_resume(world):
    start(world, name="free", num_epochs=1)
    directory = start(world, name="free", num_epochs=2, max_new_tokens=3, batch_size_eval=2, logger="tensorboard")
    assert "num_epochs: 2" in (directory / "config.yaml").read_text()
    assert "max_new_tokens: 3" in (directory / "config.yaml").read_text()
    assert list((directory / "tensorboard").glob("events*"))


def test_tensorboard_and_wandb_log_sequences_and_predictions(world, whole, monkeypatch):
    values = {"model_id": world / "dropout", "num_epochs": 3}
    directory = start(world, name="shown", logger="tensorboard", **values)
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    sequences = events.Tensors("train/sequences/text_summary")
    assert [event.step for event in sequences] == [0, 2 * STEPS]
    first, second = (event.tensor_proto.string_val[0].decode() for event in sequences)
    assert first.startswith("| stage | sequence | supervised |\n| --- | --- | --- |\n| 0 | ")
    assert "latent&#124;&gt;" in first and "&lt;&#124;latent" not in first and len(first.splitlines()) == 2 + 8
    assert second.count("&lt;&#124;latent&#124;&gt;") == 8
    assert len(events.Tensors("eval/predictions/text_summary")) == 3
    shown = []
    wandb = SimpleNamespace(__spec__=ModuleSpec("wandb", None), login=lambda **_: True, finish=lambda: None)
    wandb.Table = lambda columns, data: (columns, data)
    wandb.init, wandb.log = lambda **_: wandb, lambda metrics, step: shown.append((step, metrics))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    start(world, name="shown_to_wandb", logger="wandb", **values)
    tables = [(step, *metrics["train/sequences"]) for step, metrics in shown if "train/sequences" in metrics]
    assert [(step, columns, len(rows)) for step, columns, rows in tables] == [
        (step, ["stage", "sequence", "supervised"], 8) for step in (0, 2 * STEPS)
    ]
    assert tables[1][2][0][1].count("<|latent|>") == 1 and tables[1][2][0][1].endswith(tables[1][2][0][2])
    assert sum("eval/predictions" in metrics for _, metrics in shown) == 3


# --- what a run finds in its directory --------------------------------------------------------------------------------


@pytest.fixture
def copied(world, whole, request):
    """A copy of the run `whole`, by a name of the test's own."""
    name = re.sub(r"\W+", "_", request.node.name)
    return shutil.copytree(whole, world / "runs" / name, symlinks=True)


def test_dry_run_says_what_would_be_trained_and_neither_writes_nor_locks(world, copied, capsys):
    (copied / "last").unlink()  # a real start would restore it
    before = snapshot(world)
    start(world, "--dry-run", name="never", num_epochs=3)
    printed = capsys.readouterr().out
    assert "steps: 5 of 4 problems in each of 3 epochs, 15 in all\nstage 0: sequences of " in printed
    assert "\nstage 1: sequences of " in printed and "stage 2" not in printed
    assert printed.endswith("dry run: nothing was written\n")
    with (copied / "metrics.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start(world, "--dry-run", name=copied.name, num_epochs=5)
    printed = capsys.readouterr().out
    assert f"resuming {copied} after epoch 3, step 15" in printed
    assert "steps: 5 of 4 problems in each of 2 epochs, 10 in all\nstage 1: " in printed
    start(world, "--dry-run", name="never", only_eval=True, load_model_path=copied / "best")
    assert f"{copied}/best would be tested on 7 problems of {world}/valid.json" in capsys.readouterr().out
    start(world, "--dry-run", name="never", train_path="none.json", code=2)
    assert snapshot(world) == before


def test_directory_is_claimed_before_it_is_read(world, copied, monkeypatch):
    """Else a start that arrives as another one ends would resume from an old checkpoint."""
    tried = []

    def look(config, processes):
        with (copied / "metrics.jsonl").open("ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # two runs that share the lock would be one too many
        tried.append(config.name)
        return find_checkpoint(config, processes)

    monkeypatch.setattr(run, "find_checkpoint", look)
    start(world, name=copied.name, num_epochs=3)
    assert tried == [copied.name]
    with (copied / "metrics.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


def test_new_directory_that_another_run_used_meanwhile_is_refused(world, whole, monkeypatch, capsys):
    """Two first starts: the other one creates the directory, trains and ends while this one loads its model."""
    directory = world / "runs" / "meanwhile"

    def load(*arguments):
        shutil.copytree(whole, directory, symlinks=True)
        before.update(snapshot(directory))
        return load_pretrained(*arguments)

    before, load_pretrained = {}, run.load
    monkeypatch.setattr(run, "load", load)
    start(world, name="meanwhile", num_epochs=5, code=2)
    assert "name: another process has trained in" in capsys.readouterr().err
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("checkpoint_4", "load_model_path={path} resume=4"),
        ("checkpoint_4_step_7", "resume=4"),
        ("tensorboard", "should be a folder"),
        ("predictions_9.jsonl/", "should be a file"),
    ],
)
def test_a_file_where_a_folder_belongs_is_refused(world, copied, capsys, file, part):
    """checkpoint_4 is how the official code saves; the next save would have failed after an epoch."""
    path = copied / file
    path.mkdir() if file.endswith("/") else path.write_bytes(b"torch")
    before = snapshot(copied)
    start(world, name=copied.name, num_epochs=5, logger="tensorboard", code=2)
    message = capsys.readouterr().err
    assert f"error: name: {path} " in message and part.format(path=path) in message
    assert snapshot(copied) == before


@pytest.mark.parametrize("only_eval", [False, True])
def test_directory_that_cannot_be_written_is_refused_before_any_work(world, copied, monkeypatch, capsys, only_eval):
    monkeypatch.setattr(os, "access", lambda path, mode: path != copied)  # these tests may run as root, who can
    monkeypatch.setattr(run, "set_up", None)
    start(world, name=copied.name, num_epochs=5, only_eval=only_eval, load_model_path=copied / "last", code=2)
    assert f"error: save_path: {copied} cannot be written by this user" in capsys.readouterr().err


def test_copy_that_followed_links_resumes(world, whole, tmp_path, capsys):
    """scp -r turns best and last into folders."""
    directory = shutil.copytree(start(world, name="followed", num_epochs=2), tmp_path / "followed")
    assert not (directory / "last").is_symlink()
    start(world, name="followed", save_path=tmp_path, num_epochs=3)
    assert f"note: best, last of {directory} would be overwritten, so the old ones are in" in capsys.readouterr().out
    assert [os.readlink(directory / link) for link in ("best", "last")] == [
        os.readlink(whole / link) for link in ("best", "last")
    ]
    assert verify_manifest(directory / "earlier_1" / "best") is None
    assert verify_manifest(directory / "earlier_1" / "last") is None
    assert_same_run(directory, whole, 3)


def test_metrics_of_a_run_without_checkpoints_are_set_aside(world, whole, copied, capsys):
    """Its checkpoints were deleted by hand to make room."""
    for path in list_checkpoints(copied):
        shutil.rmtree(path)
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    start(world, name=copied.name, num_epochs=3)
    assert f"so the old ones are in {copied / 'earlier_1'}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (copied / "earlier_1").iterdir()} == before
    assert len(before) == 5
    assert_same_run(copied, whole, 3)
    start(world, name=copied.name, num_epochs=4)
    assert not (copied / "earlier_2").exists()


def test_config_that_the_user_keeps_in_the_directory_is_set_aside(world):
    directory = world / "runs" / "own_config"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(f"base: {world / 'config.yaml'}  # mine\nname: own_config\n")
    for epochs in (1, 2):
        assert run.main([str(directory / "config.yaml"), f"num_epochs={epochs}"]) == 0
    assert "# mine" in (directory / "earlier_1" / "config.yaml").read_text()
    assert load_config(directory / "config.yaml").num_epochs == 2
    assert not (directory / "earlier_2").exists()


def test_tensorboard_hides_exactly_the_steps_that_a_resumed_run_repeats(world, tmp_path):
    config = load_config(world / "config.yaml", ["name=board", "logger=tensorboard"])
    for steps, value in ((0, 1.0), (3, 2.0)):
        log = metrics_module.MetricLogger(tmp_path, config, "id", steps=steps)
        for step in range(steps + 1, 6):
            log.write({"train/loss": value}, step)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]


def test_tensorboard_that_cannot_begin_is_a_warning(world, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no space for events")

    monkeypatch.setattr(metrics_module, "start_tensorboard", fail)
    start(world, name="no_board", num_epochs=1, logger="tensorboard")
    assert "warning: tensorboard failed (no space for events); the run continues" in capsys.readouterr().out


# --- the disk ---------------------------------------------------------------------------------------------------------


def size(directory, files="checkpoint_*/*.safetensors"):
    """Bytes of weights and AdamW moments in all checkpoints of a run."""
    tensors = (item for path in directory.glob(files) for item in load_file(path).items())
    return sum(value.nbytes for name, value in tensors if not name.endswith(".step"))


@pytest.mark.parametrize("options", [{}, {"keep_checkpoints": 2}, {"save_every_steps": 2}])
def test_disk_space_estimate_covers_all_checkpoints(world, monkeypatch, options):
    told = []
    monkeypatch.setattr(
        train, "disk_report", lambda *arguments: told.append(checkpoint_manager.disk_needed(*arguments)) or ""
    )
    name = "room_" + "_".join(options)
    start(world, name=name, num_epochs=2, **options)
    before = size(world / "runs" / name)
    directory = start(world, name=name, num_epochs=8, **options)
    weights, moments = (size(directory, f"checkpoint_8/{file}.safetensors") for file in ("model", "optimizer"))
    for needed, taken in zip(told, (before, size(directory) - before), strict=True):
        assert 0 <= needed - taken <= 2 * weights + moments  # those that are there for a while only


def test_insufficient_disk_space_causes_a_warning(world, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e9 if path.exists() else None))
    arguments = (world / "runs" / "none", 2, 10**9, 2 * 10**9)
    config = load_config(world / "config.yaml", ["name=none", "num_epochs=4"])
    report = checkpoint_manager.disk_report(config, *arguments)  # two checkpoints with their states
    assert report.startswith("disk: checkpoints will take up to 6.0 GB more, 3.0 GB are free\nwarning: ")
    config.num_epochs = 3
    assert (
        checkpoint_manager.disk_report(config, *arguments)
        == "disk: checkpoints will take up to 3.0 GB more, 3.0 GB are free"
    )
    start(world, name="roomy", num_epochs=1)
    assert "disk: checkpoints will take up to 0.0 GB more" in capsys.readouterr().out


def test_checkpoints_are_listed_newest_first(tmp_path):
    names = ["checkpoint_10", "checkpoint_9_step_100", "checkpoint_9_step_95", "checkpoint_9", "checkpoint_1_step_9"]
    for name in [*sorted(names), "checkpoint_11.partial", "checkpoint_best"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == names


# --- best, last, retention, optimizer ---------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Replaces validation: returns the given accuracies, one for each epoch."""

    def arrange(accuracies):
        accuracies = iter(accuracies)
        evaluation = {"loss": 1.0, "cot_match": None, "new_tokens": 1.0, "seconds": 0.1, "predictions": [{"idx": 0}]}
        scripted = lambda validator, stage: Evaluation(accuracy=next(accuracies), **evaluation)  # noqa: E731
        monkeypatch.setattr(Validator, "validate", scripted)

    return arrange


ACCURACIES = [0.5, 0.2, 0.1, 0.3, 0.3, 0.4]  # stages 0 0 1 1 2 2
BEST = [1, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("only_improve", [False, True])
def test_epochs_without_validation_are_never_best_and_resume_exactly(world, only_improve):
    values = {"num_epochs": 5, "eval_every_epochs": 3, "eval_max_problems": 2, "save_only_improve": only_improve}
    name = f"seldom_{only_improve}"
    straight = start(world, name=name, **values)
    validations = metrics(straight, "eval/")
    assert [line["eval/epoch"] for line in validations] == [3, 5]
    assert sorted(path.name for path in straight.glob("predictions_*")) == [
        "predictions_3.jsonl",
        "predictions_5.jsonl",
    ]
    assert len(read_lines(straight / "predictions_3.jsonl")) == 2
    accuracies = {line["eval/stage"]: line["eval/epoch"] for line in validations}
    best = validations[-1]["eval/acc"] > validations[0]["eval/acc"] or len(accuracies) == 2
    assert os.readlink(straight / "best") == f"checkpoint_{5 if best else 3}"
    # The straight run saves checkpoint_4, which is not validated; only_improve removes it after the next one.
    assert ("checkpoint_4" in os.listdir(straight)) is not only_improve
    resumed = start(world, name=f"{name}_resumed", **values | {"num_epochs": 3})
    start(world, name=f"{name}_resumed", **values)
    assert_same_runs(resumed, straight)
    if not only_improve:  # from the epoch without validation
        shutil.rmtree(resumed / "checkpoint_5")
        start(world, name=f"{name}_resumed", **values)
        assert_same_runs(resumed, straight)
    evaluated = start(world, name=name, only_eval=True, load_model_path=straight / "last", eval_max_problems=2)
    assert len(read_lines(evaluated / "eval_checkpoint_5" / "predictions_valid.jsonl")) > 2


def test_best_and_last_links(world, scripted):
    scripted(ACCURACIES)
    for epoch, best in enumerate(BEST, 1):
        directory = start(world, name="best", num_epochs=epoch)
        assert os.readlink(directory / "best") == f"checkpoint_{best}"
        assert os.readlink(directory / "last") == f"checkpoint_{epoch}"


@pytest.mark.parametrize(
    ("options", "kept", "last"),
    [
        ({}, [1, 2, 3, 4, 5, 6], 6),
        ({"save_only_improve": True}, [1, 3, 4, 5, 6], 6),
        ({"keep_checkpoints": 2}, [5, 6], 6),
        ({"keep_checkpoints": 1, "epochs_per_stage": 6}, [1, 6], 6),
        ({"save_only_improve": True, "epochs_per_stage": 6}, [1, 6], 6),
    ],
)
def test_checkpoint_retention(world, scripted, options, kept, last):
    scripted(ACCURACIES)
    name = "kept_" + "_".join(options)
    directory = start(world, name=name, num_epochs=6, **options)
    assert {path.name for path in directory.glob("checkpoint_*")} == {f"checkpoint_{i}" for i in kept}
    assert os.readlink(directory / "last") == f"checkpoint_{last}"
    assert len(metrics(directory, "eval/")) == 6


@pytest.mark.parametrize(
    ("options", "states"),
    [({}, [5, 6]), ({"save_only_improve": True}, [5, 6]), ({"keep_checkpoints": 1, "epochs_per_stage": 6}, [1, 6])],
)
def test_newest_two_checkpoints_keep_optimizer_state(world, scripted, monkeypatch, options, states):
    scripted(ACCURACIES)
    hashed = []
    monkeypatch.setattr(files, "file_digest", lambda path: hashed.append(path) or file_digest(path))
    directory = start(world, name="states_" + "_".join(options), num_epochs=6, **options)
    monkeypatch.undo()
    found = [path for path in list_checkpoints(directory) if (path / "optimizer.safetensors").exists()]
    assert found == [directory / f"checkpoint_{i}" for i in reversed(states)]
    assert all(verify_manifest(path) is None for path in list_checkpoints(directory))
    hashed = [path for path in hashed if directory in path.parents]
    assert len(hashed) == 6 * len(CHECKPOINT_FILES - {"manifest.json"})  # what is there already is not read again


def test_optimizer_state_is_deleted_only_after_its_manifest_says_so(whole, tmp_path, monkeypatch):
    checkpoint = shutil.copytree(whole / "checkpoint_3", tmp_path / "checkpoint_3")

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manager, "write_manifest", full)
        checkpoint_manager.drop_optimizer_state(checkpoint)
    assert verify_manifest(checkpoint) is None and (checkpoint / "optimizer.safetensors").exists()
    checkpoint_manager.drop_optimizer_state(checkpoint)
    assert verify_manifest(checkpoint) is None and not (checkpoint / "optimizer.safetensors").exists()


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(("reset", "steps"), [(False, [5, 10, 15]), (True, [5, 10, 5]), ("every_epoch", [5, 5, 5])])
def test_reset_optimizer_at_stage_switch(world, reset, steps, in_parts):
    name = f"reset_{reset}_{in_parts}"
    for epochs in (1, 2, 3) if in_parts else (1, 3):
        directory = start(
            world, name=name if in_parts else f"{name}_{epochs}", num_epochs=epochs, reset_optimizer=reset
        )
        for epoch, count in list(enumerate(steps[:epochs], 1))[-2:]:  # the newest two keep it
            optimizer = training_state(directory / f"checkpoint_{epoch}")["optimizer"]
            assert {state["step"].item() for state in optimizer.values()} == {count}


def test_reset_optimizer_changes_losses_after_stage_switch(world, whole):
    directory = start(world, name="reset", num_epochs=3, reset_optimizer=True)
    equal = [a == b for a, b in zip(losses(directory), losses(whole), strict=True)]
    assert equal[: 2 * STEPS + 1] == [True] * (2 * STEPS + 1)
    assert not any(equal[2 * STEPS + 1 :])


def test_warmup_and_gradient_clipping(world):
    directory = start(world, name="warm", warmup_steps=3, max_grad_norm=0.01, num_epochs=1)
    rates = [line["train/lr"] for line in metrics(directory, "train/")]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])
    assert all(line["train/grad_norm"] > 0.01 for line in metrics(directory, "train/"))
    moments = training_state(directory / "checkpoint_1")["optimizer"].values()
    assert sum(m["exp_avg"].square().sum() for m in moments).sqrt() <= 0.01
    plain, wide = (start(world, name=f"norm_{n}", max_grad_norm=n, num_epochs=1) for n in (None, 1e6))
    assert_same_run(wide, plain, 1)  # smaller gradients are not scaled up


# --- only_eval --------------------------------------------------------------------------------------------------------


def test_only_eval_writes_to_eval_directory_only(world, whole):
    directory = world / "runs" / "evaluated"
    shutil.copytree(whole, directory, symlinks=True)
    before = snapshot(directory)
    command = {"only_eval": True, "load_model_path": directory / "last", "train_path": None}
    for _ in range(2):
        start(world, name="evaluated", **command)
    after = snapshot(directory)
    assert {name: after[name] for name in before} == before
    new = {name for name in after if name not in before and "/" in name}
    files = {"predictions_valid.jsonl", "metrics_valid.yaml", "predictions_valid_2.jsonl", "metrics_valid_2.yaml"}
    assert new == {f"eval_checkpoint_3/{name}" for name in files}
    written = directory / "eval_checkpoint_3"
    assert (written / "predictions_valid.jsonl").read_text() == (directory / "predictions_3.jsonl").read_text()
    summary = yaml.safe_load((written / "metrics_valid.yaml").read_text())
    [*_, trained] = metrics(whole, "eval/")
    assert summary["data_digest"] == content_digest(str(world / "valid.json"))
    assert (summary["method"], summary["stage"], summary["thoughts"]) == ("coconut", 1, 1)
    assert summary["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)


def test_resume_key_overrides_stage_in_only_eval(world, whole):
    command = {"only_eval": True, "load_model_path": whole / "last", "resume": 5}
    directory = start(world, name="stage", **command)
    assert yaml.safe_load((directory / "eval_checkpoint_3" / "metrics_valid.yaml").read_text())["stage"] == 2


def test_only_eval_warns_of_what_differs_from_the_checkpoint(world, whole, capsys):
    def warnings(**values) -> list[str]:
        start(world, name="warned", only_eval=True, load_model_path=whole / "last", debug=True, **values)
        return [
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("warning: ") and "the checkpoint has" in line
        ]

    copy = world / "with_limit_128"
    shutil.copytree(whole / "checkpoint_3", copy)
    text = (copy / "coconut.json").read_text()
    (copy / "coconut.json").write_text(text.replace('"max_new_tokens": 5', '"max_new_tokens": 128'))
    (copy / "manifest.json").unlink()
    capsys.readouterr()
    assert warnings() == warnings(resume=3) == []
    assert warnings(max_new_tokens=7) == ["warning: max_new_tokens is 7 here, but the checkpoint has 5"]
    assert warnings(max_new_tokens="None") == ["warning: max_new_tokens is 128 here, but the checkpoint has 5"]
    assert warnings(resume=5) == ["warning: stage is 2 here (resume: 5), but the checkpoint has 1"]
    start(world, name="warned", only_eval=True, load_model_path=copy, debug=True, max_new_tokens="None")
    assert "the checkpoint has" not in capsys.readouterr().out


def test_checkpoint_from_before_the_first_step_is_evaluated_at_the_first_stage(world, whole, capsys):
    copy = world / "before_first_step"
    shutil.copytree(whole / "checkpoint_3", copy)
    description = json.loads((copy / "coconut.json").read_text())
    (copy / "coconut.json").write_text(json.dumps(description | {"stage": -1, "thoughts": 0}))
    (copy / "manifest.json").unlink()
    directory = start(world, name="untrained", only_eval=True, load_model_path=copy)
    assert "at stage 0" in capsys.readouterr().out
    summary = yaml.safe_load((directory / "eval_before_first_step" / "metrics_valid.yaml").read_text())
    assert (summary["stage"], summary["thoughts"]) == (0, 0)
    assert open_checkpoint(str(copy)).stage == 0
    config = load_config(str(world / "config.yaml"), ["name=x"])
    assert describe(config, byte_tokenizer(), -1)["thoughts"] == 0


def test_only_eval_with_debug_writes_no_files(world, whole):
    before = snapshot(world)
    start(world, name="quiet", only_eval=True, load_model_path=whole / "last", debug=True)
    assert snapshot(world) == before


@pytest.mark.parametrize("key", ["load_model_path", "model_id"])
def test_loading_a_damaged_checkpoint_is_refused(world, whole, capsys, key):
    """Weights that are evaluated or fine-tuned from, by either key, are verified against their manifest."""
    damaged = world / f"flipped_{key}"
    shutil.copytree(whole / "checkpoint_3", damaged)
    flip(damaged / "training_state.pt")  # not read
    values = {"only_eval": key == "load_model_path", "num_epochs": 1, key: damaged, "debug": True}
    start(world, name="intact", **values)
    flip(damaged / "model.safetensors")
    before = snapshot(world)
    start(world, name="flipped", code=2, **values)
    found = capsys.readouterr()
    assert "has no manifest" not in found.out
    assert f"error: {key}: '{damaged}' is damaged: model.safetensors differs from its manifest" in found.err
    assert "verify: False" in found.err
    assert snapshot(world) == before
    start(world, name="flipped", verify=False, **values)


def test_model_without_manifest_is_loaded_with_a_note(world, whole, capsys):
    copy = world / "without"
    shutil.copytree(whole / "checkpoint_3", copy)
    (copy / "manifest.json").unlink()
    torch.save(load_file(copy / "model.safetensors"), world / "official.pt")
    for model in (copy, world / "official.pt"):
        start(world, name="without", only_eval=True, load_model_path=model, debug=True)
        assert f"load_model_path: {model} has no manifest.json, so it is loaded unverified" in capsys.readouterr().out


# --- gradient accumulation and several ranks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(world):
    """A run on one rank with batches of 8 and no dropout: 17 problems make steps of 8, 8 and 1."""
    return start(world, name="single", model_id=world / "plain", batch_size_training=8, num_epochs=3)


def assert_equal_training(directory, single):
    assert losses(directory) == pytest.approx(losses(single), rel=1e-5)
    norms = [[line["train/grad_norm"] for line in metrics(d, "train/")] for d in (directory, single)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # AdamW alone would not tell a gradient from half of it
    assert len(losses(single)) == 9
    for one, other in zip(metrics(directory, "eval/"), metrics(single, "eval/"), strict=True):
        assert one.pop("eval/loss") == pytest.approx(other.pop("eval/loss"), rel=1e-5)
        assert one == other
    for i in (1, 2, 3):
        assert read_lines(directory / f"predictions_{i}.jsonl") == read_lines(single / f"predictions_{i}.jsonl")
    one, other = (load_file(d / "last" / "model.safetensors") for d in (directory, single))
    assert set(one) == set(other)
    for name in set(one) - {"transformer.h.0.attn.c_attn.bias", "transformer.h.1.attn.c_attn.bias"}:
        # The gradient of a key's bias is rounding error, which AdamW scales up; all other weights agree.
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("per_pass", "passes"), [(4, 2), (1, 8), (3, 3)])
def test_gradient_accumulation_matches_one_large_batch(world, single, per_pass, passes):
    size = {"batch_size_training": per_pass, "gradient_accumulation_steps": passes}
    name = f"accumulated_{per_pass}"
    directory = start(world, name=name, model_id=world / "plain", num_epochs=3, **size)
    if per_pass * passes == 8:
        assert_equal_training(directory, single)
    else:  # another batch: the comparison can fail
        assert losses(directory)[:2] != pytest.approx(losses(single)[:2], rel=1e-5)


def test_global_batch_size_sets_gradient_accumulation(world, single, capsys):
    values = {"name": "global_batch", "model_id": world / "plain", "num_epochs": 3, "global_batch_size": 8}
    assert_equal_training(start(world, batch_size_training=4, **values), single)
    start(world, batch_size_training=2, **values | {"num_epochs": 4})  # as many problems for a step: it continues
    start(world, batch_size_training=3, **values | {"name": "no_multiple"}, code=2)
    message = capsys.readouterr().err
    assert "global_batch_size: 8 is not a multiple of batch_size_training 3 x 1 processes" in message


def test_group_by_length_refuses_another_effective_batch_within_an_epoch(world):
    values = {"model_id": world / "plain", "num_epochs": 1, "group_by_length": True}
    sizes = {"grouped_4": (4, 1), "grouped_2": (2, 2)}
    one, other = (
        start(world, name=name, batch_size_training=size, gradient_accumulation_steps=passes, **values)
        for name, (size, passes) in sizes.items()
    )
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    ungrouped = start(world, name="ungrouped", **values | {"group_by_length": False})
    assert losses(one) != pytest.approx(losses(ungrouped), rel=1e-3)
    start(world, name="grouped_4", **values | {"num_epochs": 2, "save_every_steps": 3})
    config, processes = load_config(one / "config.yaml"), Processes(world_size=2)
    check_same_training(config.resolved(), config, one / "checkpoint_1", processes)  # an epoch of its own
    with pytest.raises(UserError, match="group_by_length ties the order to 4 problems per step, now 8"):
        check_same_training(config.resolved(), config, one / "checkpoint_1_step_9", processes)


@pytest.mark.parametrize(
    ("parallel", "per_pass", "passes"),
    [
        pytest.param("ddp", 4, 1, marks=pytest.mark.slow),
        pytest.param("ddp", 2, 2, marks=pytest.mark.slow),
        ("fsdp", 2, 2),
        pytest.param("fsdp", 4, 1, marks=pytest.mark.slow),
        pytest.param("ddp", 1, 4, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, 4, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_match_one_with_twice_the_batch(world, single, parallel, per_pass, passes):
    size = {"batch_size_training": per_pass, "gradient_accumulation_steps": passes, "parallel": parallel}
    values = {"name": f"two_{parallel}_{per_pass}", "model_id": world / "plain", "num_epochs": 3, **size}
    directory, _ = start_real(world, processes=2, **values)
    assert_equal_training(directory, single)
    one, other = training_state(directory / "last")["random_states"]
    assert not torch.equal(one["cpu"], other["cpu"])  # the ranks have different dropout masks


@pytest.mark.slow
def test_resume_on_two_ranks_with_dropout_is_bit_identical(world):
    whole, _ = start_real(world, processes=2, name="two_whole", num_epochs=2)
    for epochs in (1, 2):
        directory, _ = start_real(world, processes=2, name="two_parts", num_epochs=epochs)
    assert_same_run(directory, whole, 2)


def test_each_rank_has_its_own_random_stream():
    def draw(*arguments):
        set_seed(*arguments)
        return torch.rand(3).tolist()

    assert draw(0, 1) == draw(0, 1)
    assert len({tuple(draw(*arguments)) for arguments in ((0,), (0, 0), (0, 1), (1, 0), (1, 1))}) == 5


# --- loggers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wandb_without_account_logs_offline(world, tmp_path):
    place = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    for epochs in (1, 2):
        directory, printed = start_real(world, name="wandb", logger="wandb", num_epochs=epochs, env=place)
    assert "offline" in printed
    folders = [path for path in (directory / "wandb").glob("offline-run-*") if path.is_dir()]
    assert len({path.name.rsplit("-", 1)[1] for path in folders}) == 1  # a continued run keeps its id
    assert all(list(path.glob("*.wandb")) for path in folders)
    assert len(metrics(directory, "eval/")) == 2
    assert not (world / "wandb").exists()


@pytest.mark.slow
def test_logger_none_imports_neither_wandb_nor_tensorboard(world):
    code = "import sys, run; run.main(sys.argv[1:]); print(sorted({'wandb', 'tensorboard'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, str(world / "config.yaml"), "name=light", "debug=True"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    assert finished.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("beyond", "stages", "steps"), [(39, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3], 2), (2, [0, 0, 0, 1, 1, 2, 2, 2, 2, 2], 5)]
)
def test_icot_removal_within_an_epoch_resets_optimizer(world, beyond, stages, steps):
    options = {"method": "icot", "num_epochs": 2, "remove_per_epoch": 2, "remove_all_when_remove_beyond": beyond}
    directory = start(world, name=f"icot_{beyond}", reset_optimizer=True, **options)
    assert [line["train/stage"] for line in metrics(directory, "train/")] == stages
    states = training_state(directory / "checkpoint_2")["optimizer"].values()
    assert {int(state["step"]) for state in states} == {steps}
