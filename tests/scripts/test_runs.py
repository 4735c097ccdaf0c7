"""scripts/compare.py, plot.py, record.py and evaluations.py on runs of run.py."""

import json
import shutil
import sys
from xml.etree import ElementTree

import compare
import evaluations
import plot
import pytest
import record
import yaml
from runs import display_value

import run
from analysis import style
from curriculum import METHODS
from evaluate import write_evaluation
from helpers import REPOSITORY, make_problems, save_model, words, write_json


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return a function that trains four epochs with one stage switch and returns the run directory."""
    save_path = tmp_path_factory.mktemp("runs")
    config = {
        "save_path": str(save_path),
        "model_id": save_model(save_path / "model"),
        "logger": "none",
        "max_new_tokens": 5,
    }
    config |= {"train_path": write_json(save_path / "train.json", make_problems(12)), "method": "coconut"}
    config |= {"val_path": write_json(save_path / "valid.json", make_problems(4, seed=1)), "reset_optimizer": True}
    config |= {"max_latent_stage": 1, "epochs_per_stage": 2, "num_epochs": 4, "batch_size_training": 4, "lr": 3e-3}
    (save_path / "config.yaml").write_text(yaml.safe_dump(config))

    def train_once(name, **values):
        if not (save_path / name).exists():
            assert run.main([str(save_path / "config.yaml"), *words({"name": name, **values})]) == 0
        return save_path / name

    return train_once


@pytest.fixture
def seeds(train, tmp_path):
    """Copy the runs of two seeds into a folder."""
    for seed in (0, 1):
        shutil.copytree(train(f"seed{seed}", seed=seed), tmp_path / "seeds" / str(seed), symlinks=True)
    return tmp_path / "seeds"


def rewrite_metrics(directory, change):
    """Apply a function to each line of a run's metrics.jsonl."""
    path = directory / "metrics.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_compare_accepts_rerun_and_equal_effective_batch(train, seeds, capsys):
    assert compare.main([str(train("again")), str(seeds)]) == 0
    assert " here, " not in capsys.readouterr().out  # no differing key or version
    assert compare.main([str(train("halves", batch_size_training=2, gradient_accumulation_steps=2)), str(seeds)]) == 0


@pytest.mark.parametrize("key, value", [("reset_optimizer", False), ("c_thought", 0), ("lr", 1e-3)])
def test_compare_names_differing_config_key(train, seeds, capsys, key, value):
    assert compare.main([str(train(f"wrong-{key}", **{key: value})), str(seeds)]) == 1
    output = [line.split() for line in capsys.readouterr().out.splitlines() if "config differs" in line]
    assert [line[2] for line in output] == [key]


@pytest.mark.parametrize("epochs, code", [((3,), 0), ((2, 3), 1), ((4,), 1)])
def test_compare_rejects_curve_outside_spread_for_two_epochs_or_at_end(train, seeds, capsys, epochs, code):
    def worse(line):
        return line | ({"eval/acc": 0.9} if line.get("eval/epoch") in epochs else {})

    shutil.copytree(train("seed0"), changed := seeds.parent / "changed", symlinks=True)
    rewrite_metrics(changed, worse)
    assert compare.main([str(changed), str(seeds)]) == code
    output = capsys.readouterr().out
    assert f"epoch {epochs[0]} " in output
    assert ("accuracy: outside the reference's spread" in output) == (code == 1)
    assert ("outside needs two epochs in a row" in output) == (code == 0)


def test_compare_allowed_range_has_width_of_seeds_or_margin():
    assert compare.allowed_range([0.5, 0.6], "accuracy") == pytest.approx((0.4, 0.7))
    assert compare.allowed_range([0.99, 1.0], "accuracy") == pytest.approx((0.94, 1.0))
    assert compare.allowed_range([2.0], "training loss") == pytest.approx((1.8, 2.2))
    assert compare.allowed_range([0.002, 0.004], "validation loss") == pytest.approx((0, 0.014))


def test_compare_rejects_reference_of_other_method_or_data(train, seeds, capsys, tmp_path):
    assert compare.main([str(train("cot", method="cot")), str(seeds)]) == 2
    assert "method cot" in capsys.readouterr().err
    other = write_json(tmp_path / "other.json", make_problems(4, seed=1))
    assert compare.main([str(train("other", val_path=other)), str(seeds)]) == 2
    assert "val_path other.json, but" in (error := capsys.readouterr().err) and "valid.json" in error
    shutil.copytree(train("other"), seeds / "other", symlinks=True)
    assert compare.main([str(train("seed0")), str(seeds)]) == 2
    assert "differ in val_path" in capsys.readouterr().err


def test_compare_and_plot_reject_invalid_or_unfinished_runs(train, capsys, tmp_path):
    for text in (None, "", "step 1\n", '{"eval/epoch": 1}\n', "[]\n"):
        (tmp_path / "config.yaml").write_text("method: cot")
        if text is not None:
            (tmp_path / "metrics.jsonl").write_text(text)
        assert compare.main([str(tmp_path), str(train("seed0"))]) == 2
        assert str(tmp_path) in capsys.readouterr().err
        assert plot.main([str(tmp_path), "--out", str(tmp_path / "no.svg")]) == 2
    assert not (tmp_path / "no.svg").exists()


def test_config_that_is_no_mapping_is_rejected(train, capsys, tmp_path):
    shutil.copytree(train("seed0"), tmp_path / "list", symlinks=True)
    (tmp_path / "list" / "config.yaml").write_text("- method\n")
    assert compare.main([str(tmp_path / "list"), str(train("seed0"))]) == 2
    assert "config.yaml: expected lines of 'key: value', got list" in capsys.readouterr().err


def test_plot_rejects_seeds_without_a_common_epoch(seeds, capsys, tmp_path):
    for seed, kept in (("0", (1, 3)), ("1", (2, 4))):
        rewrite_metrics(seeds / seed, lambda line, kept=kept: line if line.get("eval/epoch", kept[0]) in kept else {})
    assert plot.main([str(seeds / "0"), str(seeds / "1"), "--out", str(tmp_path / "no.svg")]) == 2
    assert "no epoch that all of these seeds have validated" in capsys.readouterr().err


def test_read_run_ignores_incomplete_last_line(train, tmp_path):
    shutil.copytree(train("seed0"), tmp_path / "running", symlinks=True)
    with open(tmp_path / "running" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 13, "train/ep')
    assert compare.main([str(tmp_path / "running"), str(train("seed0"))]) == 0


def test_plot_labels_methods_seeds_and_stages(train, seeds, tmp_path, capsys):
    runs = [train("cot", method="cot"), seeds / "0", seeds / "1", train("wrong-lr", lr=1e-3)]
    assert plot.main([*map(str, runs), "--out", str(tmp_path / "a.svg")]) == 0
    texts = {element.text for element in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert {"cot", "coconut, lr 0.003 (2 seeds)", "coconut, lr 0.001", "stage 0", "stage 1"} <= texts
    assert "chance" not in texts
    assert plot.main([*map(str, runs), "--out", str(tmp_path / "b.svg")]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_plot_draws_chance_and_a_colour_per_method(train, seeds, tmp_path):
    runs = [train("cot", method="cot"), seeds / "0", train("no_cot", method="no_cot")]
    assert plot.main([*map(str, runs), "--chance", "50", "--out", str(tmp_path / "a.svg")]) == 0
    texts = {
        text.text: text.get("style")
        for text in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")
    }
    assert "chance" in texts
    for method in ("cot", "coconut", "no_cot"):
        assert style.model_colour(method).lower() in texts[method]
    assert len({style.model_colour(method) for method in METHODS}) == 3  # the others are all grey


def test_overlapping_names_are_moved_apart_in_order():
    assert style.moved_apart([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
    assert style.moved_apart([0.5, 0.5, 0.5], 0.2) == pytest.approx([0.3, 0.5, 0.7])
    assert style.moved_apart([0.0, 0.5, 0.6, 0.9], 0.2) == pytest.approx([0.0, 0.45, 0.65, 0.9])


def test_plot_labels_differing_data(train, tmp_path):
    other = train("other", val_path=write_json(tmp_path / "other.json", make_problems(4, seed=1)))
    names = plot.labels(plot.group([plot.read_run(path) for path in (train("cot", method="cot"), other)]))
    assert names == ["cot, val_path valid.json", "coconut, val_path other.json"]


def test_plot_never_overwrites_and_rejects_invalid_paths(train, tmp_path, capsys):
    (tmp_path / "kept.png").write_text("kept")
    assert plot.main([str(train("seed0")), "--out", str(tmp_path / "kept.png")]) == 2
    assert (tmp_path / "kept.png").read_text() == "kept"
    for name in ("plot.what", "nowhere/plot.svg"):
        assert plot.main([str(train("seed0")), "--out", str(tmp_path / name)]) == 2
    assert plot.main([str(train("seed0")), "--out", str(tmp_path / "new.png")]) == 0
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(train("seed0")), "--out", str(tmp_path / "no.svg")]) == 2
    assert "pip install -r requirements.txt" in capsys.readouterr().err


@pytest.fixture
def evaluated_runs(train, tmp_path):
    """Runs of two seeds and another method; the first seed and the other method are evaluated."""
    runs = [train("seed0"), train("seed1", seed=1), train("cot", method="cot")]
    for directory in (runs[0], runs[2]):
        if not list(directory.glob("eval_*")):
            config = directory / "config.yaml"
            words = ["only_eval=True", f"load_model_path={directory}/best"]
            assert run.main([str(config), *words]) == 0
    return runs


def test_record_writes_a_reference_for_compare(evaluated_runs, tmp_path, capsys):
    folder = tmp_path / "results" / "small"
    assert record.main([str(folder), *map(str, evaluated_runs), "--command", "python make.py", "--chance", "50"]) == 0
    assert compare.main([*map(str, evaluated_runs), str(folder)]) == 0
    assert "2 seed(s)" in (output := capsys.readouterr().out)
    assert "single-seed reference" in output  # cot
    page = (folder / "README.md").read_text()
    assert "    python make.py\n    python scripts/record.py" in page
    assert str(tmp_path.parent) not in page.replace(str(folder), "")
    assert "1 x CPU" in page
    assert page.count("to ") >= 3  # intervals: of two seeds, and of two tests
    ElementTree.parse(folder / "curves.svg")
    assert {path.name for path in folder.iterdir()} == {"README.md", "curves.svg"} | {
        f"{directory.name}{ending}" for directory in evaluated_runs for ending in (".yaml", ".jsonl")
    }
    kept = (folder / "README.md").stat()
    assert record.main([str(folder), str(evaluated_runs[0])]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert (folder / "README.md").stat() == kept


def test_record_rejects_unfinished_and_duplicate_runs(train, seeds, tmp_path, capsys):
    rewrite_metrics(seeds / "1", lambda line: line if line.get("eval/epoch") != 4 else {"step": 12})
    shutil.copytree(train("seed0"), seeds / "twin", symlinks=True)
    for runs, problem in [([seeds / "1"], "3 of 4 epochs"), ([seeds / "0", seeds / "twin"], "name seed0: ")]:
        assert record.main([str(tmp_path / "out"), *map(str, runs)]) == 2
        assert problem in capsys.readouterr().err
    config = seeds / "twin" / "config.yaml"
    config.write_text(config.read_text().replace("name: seed0", "name: twin"))
    assert record.main([str(tmp_path / "out"), str(seeds / "0"), str(seeds / "twin")]) == 2
    assert "seed 0: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_record_removes_folder_on_failure(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert record.main([str(tmp_path / "out"), str(train("seed0"))]) == 2
    assert not (tmp_path / "out").exists()


def test_recorded_run_has_curves_and_evaluations_of_original(evaluated_runs, tmp_path, capsys):
    folder = tmp_path / "small"
    assert record.main([str(folder), *map(str, evaluated_runs)]) == 0
    for directory in evaluated_runs:
        recorded = folder / f"{directory.name}.yaml"
        copy, original = plot.read_run(recorded), plot.read_run(directory)
        for name in ("curves", "validations", "stages", "steps", "versions", "best"):
            assert getattr(copy, name) == getattr(original, name)
        assert copy.config == original.config | {"save_path": "checkpoints"}
        lines = [json.loads(line) for line in recorded.with_suffix(".jsonl").read_text().splitlines()]
        assert [line["train/epoch"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
        assert compare.main([str(recorded), str(directory)]) == compare.main([str(directory), str(recorded)]) == 0
    assert compare.main([*map(str, folder.glob("*.yaml")), str(folder)]) == 0
    capsys.readouterr()
    tables = []
    for runs in ([evaluated_runs[0], evaluated_runs[2]], [folder / "seed0.yaml", folder / "cot.yaml"]):
        assert evaluations.main([*map(str, runs)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert record.main([str(tmp_path / "again"), *map(str, sorted(folder.glob("*.yaml")))]) == 0
    for path in folder.glob("*l"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_record_spread_is_student_t_interval():
    assert record.spread([50.0]) == "50.0"
    assert record.spread([74.0, 76.0, 78.0]) == "76.0 ± 2.0 (71.0 to 81.0)"  # 4.303 * 2 / sqrt(3) = 4.97
    assert record.spread([0.0, 100.0]) == "50.0 ± 70.7 (0.0 to 100.0)"  # clipped to 0..100


def test_evaluations_table_with_wilson_intervals(tmp_path, capsys):
    def write(name, problems, **values):
        path = tmp_path / "run" / "eval_checkpoint_9" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"val_path": "data/far.json", "eval/acc": 0.5, **problems, **values}))

    write("metrics_far.yaml", {})  # an older file: the number of problems comes from its predictions
    assert evaluations.main([str(tmp_path / "run")]) == 2
    assert "predictions_far.jsonl" in capsys.readouterr().err
    (tmp_path / "run" / "eval_checkpoint_9" / "predictions_far.jsonl").write_text("{}\n" * 100)
    assert evaluations.main([str(tmp_path / "run")]) == 0
    assert "50.0 (40.4 to 59.6)" in capsys.readouterr().out
    write("metrics_far.yaml", {"problems": 10})
    for number in range(2, 11):
        write(f"metrics_far_{number}.yaml", {"problems": 100}, **{"eval/acc": number / 10})
    write("metrics_test.yaml", {"problems": 100}, val_path="test.json")
    assert evaluations.main([str(tmp_path / "run")]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| run | checkpoint_9 | 100.0 (96.3 to 100.0) | 50.0 (40.4 to 59.6) |"
    assert evaluations.main([str(tmp_path)]) == 2


def test_data_of_several_files_are_shown_and_recorded_file_by_file(tmp_path, capsys):
    paths = ["data/far.json", "elsewhere/near.json"]
    assert display_value("val_path", paths) == "far.json, near.json"
    assert record.project_relative([str(REPOSITORY / paths[0]), *paths[1:]]) == paths
    folder = tmp_path / "run" / "eval_checkpoint_9"
    write_evaluation([], {"val_path": paths, "problems": 100, "data_digest": "ab12", "eval/acc": 0.1}, folder)
    assert (folder / "predictions_far+1.jsonl").exists()
    assert evaluations.main([str(tmp_path / "run")]) == 0
    assert "| far+1 % |" in capsys.readouterr().out


def test_evaluations_with_other_settings_have_rows_of_their_own(tmp_path, capsys):
    def write(name, **values):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics = {"val_path": "data/far.json", "problems": 100, "data_digest": "ab12", "method": "coconut"}
        path.write_text(yaml.safe_dump(metrics | {"stage": 2} | values))

    write("run/eval_checkpoint_9/metrics_far.yaml", **{"thoughts": 6, "eval/acc": 0.1})
    write("run/eval_checkpoint_9/metrics_far_2.yaml", **{"thoughts": 0, "eval/acc": 0.2})
    write("run/eval_checkpoint_9/metrics_far_3.yaml", **{"thoughts": 6, "eval/acc": 0.3})
    assert evaluations.main([str(tmp_path / "run")]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header == "| run | checkpoint | method | stage | thoughts | far % |"
    assert [row.split("(")[0] for row in sorted(rows)] == [
        "| run | checkpoint_9 | coconut | 2 | 0 | 20.0 ",
        "| run | checkpoint_9 | coconut | 2 | 6 | 30.0 ",
    ]
    write("run/eval_checkpoint_9/metrics_far_4.yaml", **{"thoughts": 6, "eval/acc": 0.4, "data_digest": "cd34"})
    assert evaluations.main([str(tmp_path / "run")]) == 2
    assert "data/far.json differs from the file of that name" in capsys.readouterr().err


def test_record_shows_tests_of_best_as_it_was_trained(train, tmp_path):
    shutil.copytree(train("seed0"), tmp_path / "seed0", symlinks=True)
    config = tmp_path / "seed0" / "config.yaml"
    command = [str(config), "only_eval=True", f"load_model_path={tmp_path}/seed0/best", f"save_path={tmp_path}"]
    assert run.main(command) == 0
    run_ = record.read_run(tmp_path / "seed0")
    [trained] = record.tests_of(run_, run_.best["eval/epoch"]).values()
    assert (trained["method"], trained["stage"], trained["thoughts"]) == ("coconut", 1, 1)
    for changes in (["c_thought=2"], ["resume=1"], ["method=no_thoughts"]):
        assert run.main([*command, *changes]) == 0
    assert record.tests_of(run_, run_.best["eval/epoch"]) == {"valid": trained}
    assert len(evaluations.read_evaluations(tmp_path / "seed0")) == 4
