"""scripts/table1.py: which runs it starts, in which order, from which checkpoints."""

from pathlib import Path

import pytest
import table1

from config import UserError
from helpers import REPOSITORY

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
