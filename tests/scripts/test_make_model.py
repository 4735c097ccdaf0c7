"""scripts/make_model.py: its folders are models that train on the data they were made from."""

import json

import make_model
import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

import run
from helpers import write_json

PROBLEMS = [
    {"question": f"Tom has {n} pens, and buys {m}. How many?", "steps": [f"Add {m} to {n}."], "answer": f"{n + m} pens"}
    for n in range(6)
    for m in range(6)
]


@pytest.mark.parametrize("options", [[], ["--bpe", "300"]])
def test_own_text_trains_from_scratch_without_unknown_tokens(tmp_path, options, capsys):
    data, folder = write_json(tmp_path / "mine.json", PROBLEMS), tmp_path / "model"
    assert make_model.main([data, str(folder), *options]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for problem in PROBLEMS:
        for text in make_model.pieces(problem):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    config = {"model_id": str(folder), "from_scratch": True, "train_path": data, "val_path": data, "logger": "none"}
    config |= {"name": "mine", "save_path": str(tmp_path), "method": "coconut", "num_epochs": 1, "max_latent_stage": 1}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config | {"batch_size_training": 12, "max_new_tokens": 4}))
    assert run.main([str(tmp_path / "mine.yaml")]) == 0


def test_shape_and_room_for_thoughts(tmp_path):
    data, folder = write_json(tmp_path / "mine.json", PROBLEMS), tmp_path / "model"
    assert make_model.main([data, str(folder), "--layers", "3", "--width", "96"]) == 0
    config = AutoConfig.from_pretrained(folder)
    assert (config.n_layer, config.n_embd, config.n_head) == (3, 96, 3)
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    words = max(sum(len(text.split()) for text in make_model.pieces(problem)) for problem in PROBLEMS)
    assert config.n_positions >= words + 32


@pytest.mark.parametrize(
    ("question", "options", "named"),
    [
        ("two  spaces", [], "--bpe"),
        ("fine", ["--bpe", "100"], "--bpe 100"),
        ("fine", ["--bpe", "0"], "--bpe 0"),
        ("fine", ["--width", "50"], "--width 50"),
        (7, [], "problem 0"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, capsys, question, options, named):
    data = write_json(tmp_path / "mine.json", [{"question": question, "steps": ["a"], "answer": "b"}])
    assert make_model.main([data, str(tmp_path / "model"), *options]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_existing_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert make_model.main([write_json(tmp_path / "mine.json", PROBLEMS), str(tmp_path / "model")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert json.loads((tmp_path / "mine.json").read_text()) == PROBLEMS
    assert not list((tmp_path / "model").iterdir())
