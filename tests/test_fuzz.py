"""Malformed input is refused without a traceback, and untrusted files execute no code.

`python tests/stress/fuzz.py` tries many more inputs.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
import yaml

import run
from components import checkpoint
from components.data_sources import read_problems
from components.export import read_description
from components.files import MANIFEST, atomic_directory, make_private, verify_manifest
from components.pretrained import load_pretrained
from config import Config, UserError, load_config
from helpers import byte_tokenizer, make_problems, save_model, write_json
from stress.fuzz import Place, fuzz


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


KINDS = ["command line", "config", "JSON list", "JSON lines", "Parquet", "metrics.jsonl", "coconut.json"]
KINDS += ["manifest.json", "official file", "training_state.pt", "tokenizer.json", "tokenizer_config.json"]
KINDS += ["config.json", "model.safetensors", "model folder", "question"]


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_input_causes_no_traceback(sound, kind):
    slow = kind in KINDS[-6:] or kind == "official file"
    tried = fuzz(*sound.kinds()[kind], examples=10 if slow else 30)
    assert tried["accepted" if kind == "metrics.jsonl" else "refused"] >= (2 if kind == "question" else 5)


# --- regressions found by the fuzzer ----------------------------------------------------------------------------------

MANY = "9" * 5000
NO_VALUES = ["2001-99-99", "!!int a", "!!bool a", "!!timestamp a", "!!int ''", "[" * 500, MANY, "0x" + "f" * 5000]
NO_VALUES += ["9" * 20, '"\\0"', '"\\ud800"', "!!python/object/apply:os.getcwd []"]


@pytest.mark.parametrize("value", NO_VALUES, ids=lambda value: value[:20])
def test_invalid_yaml_value_is_refused_with_its_key(sound, capsys, value):
    for word in (f"seed={value}", f"name={value}", f"{value}=1", f"seed=[{value}]"):
        assert run.main([str(sound.folder / "sound.yaml"), word]) == 2
        message = capsys.readouterr().err
        assert word.partition("=")[0][:20] in message.replace("\\\\", "\\")
        assert len(message) < 1000 + len(word)
    (sound.folder / "odd.yaml").write_text(f"base: sound.yaml\nseed: {value}\n")
    with pytest.raises(UserError, match=r"odd.yaml|seed"):
        load_config(str(sound.folder / "odd.yaml"))


def test_invalid_base_path_is_refused(sound):
    for base in ('"\\0"', "7", "[a]", "x/../odd.yaml"):
        (sound.folder / "x").mkdir(exist_ok=True)
        (sound.folder / "odd.yaml").write_text(f"base: {base}\n")
        with pytest.raises(UserError, match=r"odd.yaml.* base"):
            load_config(str(sound.folder / "odd.yaml"))


def test_yaml_alias_bomb_is_abbreviated_in_error(sound):
    lines = ["a0: &a0 [1]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)), "name: *a29"]
    (sound.folder / "odd.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="name: ") as error:
        load_config(str(sound.folder / "odd.yaml"))
    assert len(str(error.value)) < 10_000


@pytest.mark.parametrize("key", ["name", "save_path", "train_path", "load_model_path", "data_cache", "model_id"])
def test_too_long_path_is_refused(sound, key):
    value = "x" * 300 if key != "model_id" else "./" + "x" * 300
    with pytest.raises(UserError, match=f"{key}: .*({'255 bytes' if key == 'name' else 'cannot be used'})"):
        load_config(str(sound.folder / "sound.yaml"), [f"{key}={value}"])


@pytest.mark.parametrize("text", ["[" * 100_000, f'[{{"question": {MANY}}}]', '{"question": "?"}\n' + "[" * 100_000])
def test_deeply_nested_json_or_huge_number_in_data_file_is_refused(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data.json: .*(not valid JSON|problem 0)"):
        read_problems(str(tmp_path / "data.json"))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, MANY, "[]", '{"token_ids": 1}', '{"stage": "1"}', '{"stage": -2}', '{"improved": 1}', "\0"]
)
def test_invalid_coconut_json_is_refused(tmp_path, text):
    (tmp_path / "coconut.json").write_text(text)
    with pytest.raises(UserError, match=r"coconut.json' cannot be read"):
        read_description(str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, MANY, "[]", json.dumps({"x" * 300: {}}), json.dumps({"\0": {}})])
def test_invalid_manifest_counts_as_damaged_checkpoint(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert verify_manifest(tmp_path) is not None


def test_tokenizer_that_fails_in_use_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": ""}))
    with pytest.raises(UserError, match=r"model_id: .*cannot be loaded"):
        load_pretrained(Config({"model_id": folder, "method": "coconut"}), None)


# --- untrusted files --------------------------------------------------------------------------------------------------


class Harmful:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_pickled_code_in_training_state_is_refused(tmp_path):
    torch.save(
        {"state": {"run_id": Harmful(tmp_path / "ran")}, "random_states": []}, tmp_path / checkpoint.TRAINING_STATE
    )
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"cannot be resumed: .*can execute code"):
        checkpoint.read_training_state(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / checkpoint.TRAINING_STATE, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("where", ["file", "base", "word"])
def test_yaml_python_tag_is_not_executed(sound, where):
    harm = f"!!python/object/apply:os.mkdir [{sound.folder / 'ran'}]"
    (sound.folder / "harm.yaml").write_text("seed: 1" if where == "word" else f"seed: {harm}")
    (sound.folder / "child.yaml").write_text("base: harm.yaml")
    words = [f"seed={harm}"] if where == "word" else []
    with pytest.raises(UserError, match=r"harm.yaml|seed"):
        load_config(str(sound.folder / ("harm.yaml" if where == "file" else "child.yaml")), words)
    assert not (sound.folder / "ran").exists()
    yaml.unsafe_load(harm)
    (sound.folder / "ran").rmdir()  # it would have


def with_code(tmp_path, file: str, **changes) -> Path:
    """A model folder whose `file` refers to code in own.py (auto_map); if executed, it would write a file."""
    folder = tmp_path / "model"
    save_model(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    maps = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes, "auto_map": maps}))
    return folder


@pytest.mark.parametrize("key", ["model_id", "load_model_path"])
def test_model_folder_with_auto_map_code_is_refused(tmp_path, key):
    folder = with_code(tmp_path, "config.json", model_type="own")
    config = Config({"model_id": str(folder), "method": "coconut"})
    with pytest.raises(UserError, match=f"{key}: .*has code of its own, .*trust_remote_code"):
        load_pretrained(config, folder if key == "load_model_path" else None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("plain", [True, False], ids=["with tokenizer.json", "without"])
def test_tokenizer_auto_map_code_is_not_executed(tmp_path, plain):
    """The tokenizer is read from tokenizer.json if there is one; otherwise the folder is refused."""
    folder = with_code(tmp_path, "tokenizer_config.json", tokenizer_class="Own")
    config = Config({"model_id": str(folder), "method": "coconut"})
    if plain:
        assert load_pretrained(config, None).tokenizer("1+1")["input_ids"] == byte_tokenizer()("1+1")["input_ids"]
    else:
        (folder / "tokenizer.json").unlink()
        with pytest.raises(UserError, match="cannot be loaded"):
            load_pretrained(config, None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["__import__('os').mkdir('ran')", '{"question": "${ran}", "answer": "`ran`"}'])
def test_data_file_content_is_not_executed(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("data.json").write_text(text)
    with pytest.raises(UserError):
        read_problems("data.json")
    assert os.listdir() == ["data.json"]


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_directories_have_mode_0700(tmp_path):
    before = os.umask(0)
    try:
        (tmp_path / "old").mkdir(mode=0o755)
        make_private(tmp_path / "old" / "a" / "b")
        make_private(tmp_path / "old" / "a" / "b")  # as another process does
        with atomic_directory(tmp_path / "old" / "c" / "whole") as partial:
            assert rights(partial) == 0o700
    finally:
        os.umask(before)
    assert rights(tmp_path / "old") == 0o755
    assert {rights(tmp_path / "old" / name) for name in ("a", "a/b", "c", "c/whole")} == {0o700}


def test_run_directories_have_mode_0700(sound, tmp_path):
    data = write_json(tmp_path / "data.json", make_problems(2))
    words = [f"{key}={data}" for key in ("train_path", "val_path")]
    words += [f"save_path={tmp_path / 'new' / 'saved'}", f"data_cache={tmp_path / 'new' / 'cache'}", "max_new_tokens=2"]
    assert run.main([str(sound.folder / "sound.yaml"), *words]) == 0
    folders = [path for path in (tmp_path / "new").rglob("*") if path.is_dir() and not path.is_symlink()]
    assert {"saved", "cache", "r", "checkpoint_1"} <= {path.name for path in folders}
    assert {rights(path) for path in (tmp_path / "new", *folders)} == {0o700}
