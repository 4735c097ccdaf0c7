"""Unit tests of train.py."""

import math

import pytest
import torch

import train
from components.distributed import Processes
from components.errors import NotFiniteError
from config import load_config
from helpers import make_problems, save_model, write_json
from run import set_up
from utils import StopRequest


def test_git_commit_is_unknown_without_git(monkeypatch):
    assert train.git_commit() != "unknown"
    monkeypatch.setenv("PATH", "")
    assert train.git_commit() == "unknown"


@pytest.fixture
def words(tmp_path) -> list[str]:
    """The command line of a small run."""
    problems = [*make_problems(4, steps=3), *make_problems(4, steps=1)]
    problems[-1]["question"] += " as ever"  # the longest question has not the longest answer
    data = write_json(tmp_path / "data.json", problems)
    config = tmp_path / "config.yaml"
    config.write_text("method: coconut\nlogger: none\nname: small\n")
    paths = [f"save_path={tmp_path}", f"model_id={save_model(tmp_path / 'model')}", f"data_cache={tmp_path / 'cache'}"]
    return [str(config), f"train_path={data}", f"val_path={data}", *paths]


def test_filler_problems_are_in_no_count_or_message(words):
    """A rank without examples in a step computes one whose loss does not count; predictions are never filled up."""
    trainer = set_up(load_config(words[0], words[1:]), Processes(), StopRequest())
    own, filler = trainer.make_batches(0, train.StepSpec(1, 0, [[3], []], filler=5))
    assert (own["idx"].tolist(), filler["idx"].tolist()) == ([3], [-1])
    assert (filler["labels"] == -100).all()
    totals = trainer.all_gather_totals(None, [own, filler])
    assert (totals.tokens, totals.supervised) == (own["attention_mask"].sum(), len(own["plan"].targets))
    not_finite = train.StepTotals(math.nan, 1.0, 0, 1.0, 1.0)
    with pytest.raises(NotFiniteError, match=r"on the training problems \[\[3\]\];"):
        trainer.optimizer_step(not_finite, [own, filler], "epoch 1, step 1")


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_sets_matmul_precision(words, tf32):
    before = torch.get_float32_matmul_precision()
    try:
        set_up(load_config(words[0], [*words[1:], f"tf32={tf32}"]), Processes(), StopRequest())
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    finally:
        torch.set_float32_matmul_precision(before)
