"""scripts/table1.py: which runs it starts, in which order, and from which checkpoints."""

from pathlib import Path

import pytest
import table1

from config import UserError
from helpers import REPOSITORY

ARGS = REPOSITORY / "args"


@pytest.fixture
def launched(monkeypatch):
    """The config's name and the words of each run.py that would run."""
    runs = []
    monkeypatch.setattr(table1, "launch", lambda processes, path, words: runs.append((path.name, words)))
    return runs


def test_a_run_comes_after_the_one_that_it_starts_from_with_the_same_seed(launched):
    table1.train(ARGS / "gsm_coconut.yaml", 2, 1, ["bf16=True"])
    assert launched == [
        ("gsm_cot.yaml", ["bf16=True", "name=gsm-cot-seed2", "seed=2"]),
        (
            "gsm_coconut.yaml",
            ["bf16=True", "name=gsm-coconut-seed2", "seed=2", "load_model_path=checkpoints/gsm-cot-seed2/best"],
        ),
    ]


def test_a_start_of_the_users_own_is_left_as_it_is(launched):
    table1.train(ARGS / "gsm_coconut.yaml", 0, 1, ["load_model_path=elsewhere/best"])
    assert launched == [("gsm_coconut.yaml", ["load_model_path=elsewhere/best", "name=gsm-coconut-seed0", "seed=0"])]


@pytest.mark.parametrize("dataset", ["gsm", "prontoqa", "prosqa", "ring", "mini"])
def test_every_start_has_a_config_beside_that_of_the_method(dataset, launched):
    for method in table1.METHODS:
        table1.train(ARGS / f"{dataset}_{method}.yaml", 0, 1, [])
    trained = set()
    for _, words in launched:
        given = dict(word.split("=", 1) for word in words)
        assert "load_model_path" not in given or Path(given["load_model_path"]).parent.name in trained
        trained.add(given["name"])
    assert len(trained) >= len(table1.METHODS)


def test_a_start_without_a_config_is_named(launched, tmp_path):
    (tmp_path / "x_coconut.yaml").write_text("load_model_path: checkpoints/x-none/best\n")
    with pytest.raises(UserError, match=r"x_none\.yaml"):
        table1.train(tmp_path / "x_coconut.yaml", 0, 1, [])
    assert not launched
