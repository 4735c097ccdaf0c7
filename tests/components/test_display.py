"""What a training run shows: in a log, in a terminal, on other ranks."""

import io
import os
import subprocess
import sys
from functools import partialmethod
from unittest.mock import Mock

import pytest
from tqdm import tqdm

import run
import train
from components import display
from components.display import Display
from components.distributed import Processes
from components.errors import NotFiniteError
from config import Config
from helpers import REPOSITORY, make_problems, save_model, words, write_json

VALID = {"eval/loss": 0.25, "eval/acc": 0.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(steps: int, done: int = 0, epochs: int = 1, rank: int = 0, metrics: dict | None = None) -> None:
    """Shows epochs of a number of steps, of which the first has `done` behind it; loss n at the nth step."""
    view = Display(Config({"method": "cot", "num_epochs": epochs}), Processes(rank, 2))
    for epoch in range(epochs):
        view.start_epoch(epoch, done, steps)
        for number in range(done + 1, steps + 1):
            view.step(0, float(number), tokens=3000.0, seconds=0.5)
        view.end_steps()
        view.end_epoch(0, VALID if metrics is None else metrics, f"checkpoint_{epoch + 1}")
        done = 0


@pytest.mark.parametrize(("steps", "lines"), [(1, 1), (7, 7), (10, 10), (25, 10), (1250, 10)])
def test_log_has_a_line_per_tenth_of_an_epoch_and_no_carriage_returns(capsys, steps, lines):
    shown(steps)
    *progress, row = (output := capsys.readouterr()).out.splitlines()
    assert len(progress) == lines and "\r" not in output.out and output.err == ""
    assert f"  {steps}/{steps}  " in progress[-1]
    assert f"train {(steps + 1) / 2:.3f}  valid 0.250  acc 50.0%  tok/s 6.0k" in row and row.endswith("checkpoint_1")


def test_progress_averages_over_recent_steps_and_estimates_the_time_left(capsys):
    shown(200, epochs=2)
    first_epoch = capsys.readouterr().out.splitlines()[:10]
    assert "200/200  loss 175.500  6.0k tok/s" in first_epoch[-1]  # steps 151 to 200
    assert "about 01:40 left" in first_epoch[-1]  # the second epoch: 200 steps of 0.5 s
    assert "about 03:10 left" in first_epoch[0]


def test_row_of_an_epoch_without_validation_has_the_columns_of_one_with(capsys):
    shown(2, metrics={})
    assert "train 1.500  valid -  acc -  CoT -  tok/s" in capsys.readouterr().out


def test_resumed_epoch_begins_where_it_was(capsys):
    shown(10, done=8)
    progress = capsys.readouterr().out.splitlines()
    assert [" 9/10 " in progress[0], "10/10 " in progress[1], len(progress)] == [True, True, 3]
    shown(10, done=10)  # nothing was left but the validation
    assert "train nan  valid 0.250" in capsys.readouterr().out


def test_terminal_has_one_redrawn_line_and_a_table_with_one_header(monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(display, "tqdm", eager := type("Eager", (tqdm,), {}))
    monkeypatch.setattr(eager, "__init__", partialmethod(tqdm.__init__, mininterval=0))
    shown(20, epochs=2, metrics={**VALID, "eval/cot_em": 0.75})
    table = [line.split("\r")[-1].split() for line in terminal.getvalue().splitlines(keepends=True) if "\n" in line]
    assert table[0] == ["epoch", "stage", "train", "valid", "acc", "CoT", "tok/s", "time", "saved"]
    assert [row[:7] for row in table[1:]] == [[e, "0", "10.500", "0.250", "50.0%", "75.0%", "6.0k"] for e in "12"]
    assert terminal.getvalue().count("\n") == 3
    assert f"\repoch 1/2 stage 0  {'━' * 10 + '─' * 10}  10/20  loss 5.500  6.0k tok/s  " in terminal.getvalue()


def test_message_of_an_error_within_an_epoch_begins_a_line_in_a_terminal(monkeypatch, tmp_path):
    values = {"save_path": tmp_path, "name": "run", "logger": "none", "method": "cot", "batch_size_training": 2}
    values |= {name: write_json(tmp_path / f"{name}.json", make_problems(8)) for name in ("train_path", "val_path")}
    values["model_id"] = save_model(tmp_path / "model")
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setattr(train.Trainer, "optimizer_step", Mock(side_effect=[0.1, NotFiniteError("loss nan")]))
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, mininterval=0))
    assert run.main([str(tmp_path / "config.yaml"), *words(values)]) == 3
    *_, before, message = terminal.getvalue().replace("\n", "\r").removesuffix("\r").split("\r")
    assert message == "error: loss nan" and not before.strip()


def test_other_ranks_show_nothing(capsys, monkeypatch):
    shown(20, rank=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    shown(20, rank=1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("broken", ["ascii", "full", "closed"])
def test_printing_never_fails(tmp_path, monkeypatch, broken):
    if broken == "closed":
        reading, writing = os.pipe()
        os.close(reading)
    target = {"ascii": tmp_path / "log", "full": "/dev/full", "closed": writing if broken == "closed" else None}[broken]
    with open(target, "w", encoding="ascii") as stdout, open(os.devnull, "w") as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        display.print_without_errors()
        print("Ann’s question", flush=True)
        for bar in (tqdm(range(3), file=sys.stdout), tqdm(range(3))):
            list(bar)
        print("x" * 100_000)
        sys.stdout.flush()
        assert sys.stdout.fileno() == stdout.fileno() and not sys.stdout.isatty()
    if broken == "ascii":
        assert (tmp_path / "log").read_bytes().startswith(b"Ann\\u2019s question\n")


@pytest.mark.slow
def test_run_survives_a_log_on_a_full_disk_in_ascii(tmp_path):
    """What a terminal or log cannot take must not cost an epoch."""
    problems = [{**problem, "question": "Ann’s " + problem["question"]} for problem in make_problems(4)]
    data = write_json(tmp_path / "data.json", problems)
    values = {"method": "cot", "name": "new", "save_path": tmp_path, "logger": "none", "max_new_tokens": 4}
    values |= {"model_id": save_model(tmp_path / "model"), "train_path": data, "val_path": data}
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    command = [sys.executable, str(REPOSITORY / "run.py"), str(tmp_path / "config.yaml"), *words(values)]
    with open("/dev/full", "w") as log:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    assert code == 0 and (tmp_path / "new" / "last" / "model.safetensors").exists()
