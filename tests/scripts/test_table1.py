"""scripts/table1.py: which runs it starts, in which order, from which checkpoints."""

import json
import signal
import sys
from pathlib import Path

import pytest
import table1
import yaml

from components.data_sources import content_digest
from config import Config, UserError
from helpers import REPOSITORY, make_problems, write_json

ARGS = REPOSITORY / "args"


@pytest.fixture
def launched(monkeypatch):
    """Collect the config names and overrides of the run.py calls instead of running them."""
    runs = []
    monkeypatch.setattr(table1, "launch", lambda processes, path, overrides: runs.append((path.name, overrides)))
    return runs


def test_table1_trains_start_checkpoint_with_same_seed_first(launched):
    table1.train(ARGS / "gsm_coconut.yaml", 2, 1, ["bf16=True"])
    assert launched == [
        ("gsm_cot.yaml", ["bf16=True", "name=gsm-cot-seed2", "seed=2"]),
        (
            "gsm_coconut.yaml",
            ["bf16=True", "name=gsm-coconut-seed2", "seed=2", "load_model_path=checkpoints/gsm-cot-seed2/best"],
        ),
    ]


def test_table1_keeps_load_model_path_override(launched):
    table1.train(ARGS / "gsm_coconut.yaml", 0, 1, ["load_model_path=elsewhere/best"])
    assert launched == [("gsm_coconut.yaml", ["load_model_path=elsewhere/best", "name=gsm-coconut-seed0", "seed=0"])]


@pytest.mark.parametrize("dataset", ["gsm", "prontoqa", "prosqa", "ring", "mini"])
def test_table1_start_checkpoints_all_have_a_config(dataset, launched):
    for method in table1.METHODS:
        table1.train(ARGS / f"{dataset}_{method}.yaml", 0, 1, [])
    trained = set()
    for _, overrides in launched:
        values = dict(override.split("=", 1) for override in overrides)
        assert "load_model_path" not in values or Path(values["load_model_path"]).parent.name in trained
        trained.add(values["name"])
    assert len(trained) >= len(table1.METHODS)


def test_table1_names_missing_config_of_start_checkpoint(launched, tmp_path):
    (tmp_path / "x_coconut.yaml").write_text("load_model_path: checkpoints/x-none/best\n")
    with pytest.raises(UserError, match=r"x_none\.yaml"):
        table1.train(tmp_path / "x_coconut.yaml", 0, 1, [])
    assert not launched


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A place with args/tiny_coconut.yaml, its data and a trained run; tests write metrics that depend on val_path."""
    for part, seed in (("valid", 1), ("test", 2), ("test_easy", 3)):
        write_json(tmp_path / f"tiny_{part}.json", make_problems(3, seed=seed))
    (tmp_path / "args").mkdir()
    config = {"name": "tiny", "save_path": "runs", "val_path": "tiny_valid.json", "method": "coconut"}
    (tmp_path / "args" / "tiny_coconut.yaml").write_text(yaml.safe_dump(config))
    best = tmp_path / "runs" / "tiny-seed0" / "best"
    monkeypatch.setattr(table1, "ROOT", tmp_path)

    def launch(processes, path, overrides):
        best.mkdir(parents=True, exist_ok=True)
        (best / "coconut.json").write_text(json.dumps({"method": "coconut", "stage": 2, "thoughts": 6}))
        if "only_eval=True" in overrides:
            test = next(word.removeprefix("val_path=") for word in overrides if word.startswith("val_path="))
            write_test(tmp_path, test, 0.25)

    monkeypatch.setattr(table1, "launch", launch)
    return tmp_path


def write_test(place, name, accuracy, **changes):
    """Write the metrics of a test of `best`."""
    metrics = {"val_path": name, "data_digest": content_digest(str(place / name)), "eval/acc": accuracy}
    metrics |= {"method": "coconut", "stage": 2, "thoughts": 6, "eval/new_tokens": 2.0, "eval/seconds": 0.1}
    folder = place / "runs" / "tiny-seed0" / "eval_best"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"metrics_{Path(name).stem}_{len(list(folder.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(metrics | changes))


def table_of(monkeypatch, capsys, *overrides) -> str:
    monkeypatch.setattr(sys, "argv", ["table1.py", "tiny", "--methods", "coconut", *overrides])
    table1.main()
    return capsys.readouterr().out


def test_table1_shows_tests_of_its_own_test_set_and_settings_only(place, monkeypatch, capsys):
    write_test(place, "tiny_test_easy.json", 0.9)
    write_test(place, "tiny_test.json", 0.8, thoughts=3)
    write_test(place, "tiny_test.json", 0.7, stage=1)
    write_test(place, "tiny_test.json", 0.6, method="no_thoughts")
    write_test(place, "tiny_test.json", 0.5, data_digest=None)  # a file of an earlier version
    table = table_of(monkeypatch, capsys)
    assert "test set tiny_test.json" in table
    assert "| coconut | 25.0 |" in table
    write_test(place, "tiny_test.json", 0.75)  # a finished test is not repeated
    assert "| coconut | 75.0 |" in table_of(monkeypatch, capsys)


@pytest.mark.parametrize("override", ["val_path=tiny_test.json", "val_path=tiny_test_easy.json"])
def test_table1_refuses_the_validation_file_as_test_set(place, monkeypatch, capsys, override):
    with pytest.raises(SystemExit, match="has the validation problems"):
        table_of(monkeypatch, capsys, override)
    assert not (place / "runs").exists()


def test_the_test_set_of_several_validation_files_has_as_many(place):
    write_json(place / "more_valid.json", make_problems(2))
    write_json(place / "more_test.json", make_problems(2, seed=5))
    test, digest = table1.test_file(Config({"val_path": ["tiny_valid.json", "more_valid.json"]}))
    assert test == ["tiny_test.json", "more_test.json"]
    assert digest == content_digest([str(place / name) for name in test])


def test_table1_refuses_a_copy_of_the_validation_file_and_debug(place, monkeypatch, capsys):
    (place / "tiny_test.json").write_bytes((place / "tiny_valid.json").read_bytes())
    with pytest.raises(SystemExit, match="has the validation problems"):
        table_of(monkeypatch, capsys)
    with pytest.raises(SystemExit, match="debug: True writes no checkpoint"):
        table_of(monkeypatch, capsys, "debug=True")
    assert not (place / "runs").exists()


def test_ctrl_c_lets_the_run_save_and_exits_with_130(place, monkeypatch, capsys):
    """A terminal sends Ctrl-C to run.py too, which finishes its step; table1 must not kill it, and waits for it."""
    monkeypatch.undo()
    monkeypatch.setattr(table1, "ROOT", place)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    (place / "run.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: [time.sleep(1), pathlib.Path('saved').touch(), sys.exit(130)])\n"
        "import os\n"
        "os.kill(os.getppid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(SystemExit) as raised:
        table_of(monkeypatch, capsys)
    assert raised.value.code == 130
    assert (place / "saved").exists()
    assert "rerun the same command to resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("option", ["--seeds", "--processes"])
def test_table1_refuses_no_seeds_and_no_processes(monkeypatch, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        table_of(monkeypatch, capsys, option, "0")
    assert f"{option}: expected an integer >= 1" in capsys.readouterr().err


def test_expected_time_is_that_of_the_slowest_run_so_far():
    assert table1.expected_time(9, []) == ""
    assert table1.expected_time(9, [2.0, 0.1]) == ", about 18 s"  # the second had finished before
    assert table1.expected_time(9, [2.0, 20.0]) == ", about 3 min"
