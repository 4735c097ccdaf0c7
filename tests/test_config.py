"""What users write: configs that work, and mistakes, each of them a short message, exit code 2 and nothing written."""

import importlib.util
import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

import run
from components.display import GROUPS
from config import FREE_KEYS, Config, UserError, load_config, missing_packages, read_yaml
from helpers import REPOSITORY, byte_tokenizer, make_problems, run_script, save_model, snapshot, words, write_json

# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    """A working directory with a config, data and a model that would run."""
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "train.json", make_problems(6))
    write_json(tmp_path / "valid.json", make_problems(3, seed=1))
    config = {"name": "r", "method": "cot", "model_id": model, "train_path": "train.json", "val_path": "valid.json"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "logger": "none", "max_new_tokens": 4}))
    return tmp_path


def refusal(capsys, place, *command, config="config.yaml"):
    """The message of a run that must be refused: a few lines, exit code 2, nothing written."""
    before = snapshot(place)
    assert run.main([str(config), *command]) == 2
    assert snapshot(place) == before
    printed = capsys.readouterr().err
    message = printed[printed.index("error: ") :]  # bars of loading weights may come before
    assert len(message.splitlines()) <= 5
    assert "Traceback" not in printed
    return message


def test_the_config_of_these_tests_runs(place, capsys):
    assert run.main(["config.yaml", "num_epochs=1"]) == 0


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("num_epoch=3", ["num_epoch", "unknown", "num_epochs"]),
        ("learning_rate=1", ["learning_rate", "unknown"]),
        ("batchsize_training=3", ["batchsize_training", "unknown", "batch_size_training"]),
        ("lr=fast", ["lr", "'fast'", "float"]),
        ("lr=True", ["lr", "True", "float"]),
        ("lr=[1]", ["lr", "[1]"]),
        ("num_epochs=2.5", ["num_epochs", "2.5", "int"]),
        ("num_epochs=three", ["num_epochs", "three", "int"]),
        ("num_epochs=True", ["num_epochs", "True", "int"]),
        ("bf16=1", ["bf16", "1", "bool"]),
        ("bf16=maybe", ["bf16", "maybe", "bool"]),
        ("name=7", ["name", "7", "str"]),
        ("train_path=[a]", ["train_path: 'a' does not exist"]),
        ("train_path=[train.json, 5]", ["train_path", "expected a string, got 5"]),
        ("train_path={train.json: 1}", ["train_path", "a string or a list of strings or None, got {"]),
        ("val_path=[]", ["val_path", "missing"]),
        ("columns={quest: problem}", ["columns", "unknown value 'quest'", "question"]),
        ("columns={question: 7}", ["columns", "expected a string, got 7"]),
        ("columns=question", ["columns", "a mapping of strings or None, got 'question'"]),
        ("lr=nan", ["lr", "nan", "finite"]),
        ("lr=.inf", ["lr", "inf", "finite"]),
        ("lr=-1e-4", ["lr", "-0.0001", "above 0"]),
        ("lr=0", ["lr", "0.0", "above 0"]),  # no weight would move
        ("max_grad_norm=0", ["max_grad_norm", "0.0", "above 0", "None: no clipping"]),  # likewise
        ("removal_smoothing_lambda=0", ["removal_smoothing_lambda", "above 0", "None"]),
        ("weight_decay=-1", ["weight_decay", "-1", "at least 0"]),
        ("uniform_prob=1.5", ["uniform_prob", "1.5", "from 0 to 1"]),
        ("uniform_prob=-0.1", ["uniform_prob", "-0.1", "from 0 to 1"]),
        ("uniform_prob=nan", ["uniform_prob", "nan"]),
        ("batch_size_training=0", ["batch_size_training", "0", "at least 1"]),
        ("gradient_accumulation_steps=-2", ["gradient_accumulation_steps", "-2"]),
        ("epochs_per_stage=0", ["epochs_per_stage", "at least 1"]),
        ("num_epochs=0", ["num_epochs", "from 1 to 1000000"]),
        ("c_thought=-1", ["c_thought", "-1"]),
        ("max_latent_stage=-1", ["max_latent_stage", "-1"]),
        ("resume=-1", ["resume", "-1"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=99999999999999999999999", ["seed", "99999999999999999999999", "out of range"]),
        ("max_new_tokens=0", ["max_new_tokens", "0"]),
        pytest.param("lr=1" + "0" * 400, ["lr", "out of range"], id="lr=10**400"),
        ("method=cto", ["method", "'cto'", "coconut", "cot"]),
        ("method=null", ["method", "none chosen", "coconut"]),
        ("coconut=True", ["method", "two methods", "coconut", "cot"]),
        ("logger=paper", ["logger", "'paper'", "wandb"]),
        ("reset_optimizer=sometimes", ["reset_optimizer", "'sometimes'", "every_epoch"]),
        ("only_eval=True", ["load_model_path", "only_eval"]),
        ("resume=1", ["resume", "num_epochs"]),
        ("train_path=missing.json", ["train_path", "missing.json", "does not exist in /"]),
        ("train_path=$NOWHERE/x.json", ["train_path", "$NOWHERE/x.json", "a variable that is not set"]),
        ("save_path=${NOWHERE}/x", ["save_path", "${NOWHERE}/x", "a variable that is not set"]),
        ("val_path=missing.json", ["val_path", "missing.json", "does not exist"]),
        ("train_path=null", ["train_path", "missing"]),
        ("name=null", ["name", "missing"]),
        ("name=a/b", ["name", "a/b", "save_path"]),
        ("name=..", ["name", "..", "save_path"]),
        ("model_id=./missing", ["model_id", "./missing", "does not exist"]),
        ("model_id=nobody/no-such-model", ["model_id", "nobody/no-such-model", "set model_id to a folder"]),
        ("load_model_path=missing/best", ["load_model_path", "missing/best", "does not exist"]),
        ("save_path=YOUR_PATH_TO_SAVE_THE_MODEL", ["save_path", "YOUR_PATH_TO_SAVE_THE_MODEL", "placeholder"]),
        ("load_model_path=YOUR_PATH_TO_COT_CHECKPOINT", ["load_model_path", "YOUR_PATH_TO_COT", "placeholder"]),
        ("train.json", ["train.json", "key=value"]),
        ("name='open", ["name", "quote"]),
    ],
)
def test_a_mistake_in_the_config_is_refused(place, capsys, command, parts):
    message = refusal(capsys, place, command)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("--lr 1e-3", "--lr 1e-3: expected key=value; write lr=1e-3"),
        ("lr = 1e-3 seed=1", "lr = 1e-3 seed=1: expected key=value; write lr=1e-3 seed=1"),
        ("--lr 1e-3 --seed 1", "--lr 1e-3 --seed 1: expected key=value; write lr=1e-3 seed=1"),
        ("--bf16", "--bf16: expected key=value, such as lr=1e-3"),
    ],
)
def test_words_in_another_form_are_answered_with_the_right_one(place, capsys, command, remedy):
    assert refusal(capsys, place, *command.split()).splitlines()[1:] == [f"  - {remedy}"]


def test_help_shows_every_key_once_in_its_group_with_default_and_meaning(capsys):
    assert run.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for key in fields(Config):
        assert len(re.findall(rf"^  {key.name}={re.escape(str(key.default))} +\S", printed, re.MULTILINE)) == 1, (
            key.name
        )
    source = inspect.getsource(Config)  # its comments begin the groups
    assert list(GROUPS) == re.findall(r"^    # [a-z].*\n    (\w+):", source, re.MULTILINE)
    assert "\nCurriculum\n  c_thought=1    " in printed


def test_no_arguments_show_the_usage_with_an_example(capsys):
    assert run.main([]) == 2
    assert "run.py args/gsm_cot.yaml lr=5e-5" in capsys.readouterr().out


def test_python_without_torch_is_told_to_activate_the_environment():
    command = [sys.executable, "-S", "-I", str(REPOSITORY / "run.py"), "args/ring_cot.yaml"]  # no site-packages
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {sys.executable} has no torch; activate the environment: source .venv/bin/activate\n"


TEXT_MISTAKES = [
    (b"", ["not valid JSON", "expected a list"]),
    (b"[]", ["an empty list"]),
    (b"{}", ["expected a list of problems", "dict"]),
    (b'"text"', ["expected a list of problems", "str"]),
    (b'[{"question": "a", ', ["not valid JSON", "line 1"]),
    (b'[{"question": "\xe9"}]', ["not UTF-8", "byte 15"]),
    (b"\xff\xfe[\x00]\x00", ["not UTF-8", "UTF-16"]),
    (b"[1, 2]", ["problem 0", "int"]),
    (b"[[]]", ["problem 0", "list"]),
    (b"[null]", ["problem 0", "NoneType"]),
]
GOOD = {"question": "1+1", "answer": "2", "steps": ["1+1=2"]}
PROBLEM_MISTAKES = [
    ({"steps": ...}, ['no "steps"']),
    ({"question": ...}, ['no "question"']),
    ({"answer": ...}, ['no "answer"']),
    ({"steps": "1+1=2"}, ["steps", "expected a list", "1+1=2"]),
    ({"steps": None}, ["steps", "expected a list", "None"]),
    ({"steps": ["a", 5]}, ["steps[1]", "expected a string", "5"]),
    ({"steps": [["a"]]}, ["steps[0]", "expected a string"]),
    ({"answer": 2}, ["answer", "expected a string", "2"]),
    ({"answer": None}, ["answer", "expected a string", "None"]),
    ({"question": 2}, ["question", "expected a string"]),
    ({"question": ""}, ["question", "empty"]),
    ({"question": " \n"}, ["question", "empty"]),
    ({"question": "half \ud800"}, ["question", "surrogate"]),
    ({"question": "why <|latent|>"}, ["question", "<|latent|>"]),
    ({"steps": ["<|end-latent|>"]}, ["steps[0]", "<|end-latent|>"]),
]


@pytest.mark.parametrize("key", ["train_path", "val_path"])
@pytest.mark.parametrize(("content", "parts"), TEXT_MISTAKES, ids=range(len(TEXT_MISTAKES)))
def test_a_data_file_that_is_no_list_of_problems_is_refused(place, capsys, key, content, parts):
    (place / "bad.json").write_bytes(content)
    message = refusal(capsys, place, f"{key}=bad.json")
    assert [part for part in ["bad.json", *parts] if part not in message] == []


@pytest.mark.parametrize(("change", "parts"), PROBLEM_MISTAKES, ids=lambda value: str(value)[:40])
def test_a_problem_with_a_bad_field_is_refused_by_file_index_and_field(place, capsys, change, parts):
    bad = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    write_json(place / "bad.json", [GOOD, GOOD, bad])
    message = refusal(capsys, place, "train_path=bad.json")
    assert [part for part in ["bad.json", "problem 2", *parts] if part not in message] == []


def test_a_data_file_that_is_a_directory_is_refused(place, capsys):
    (place / "folder").mkdir()
    assert "folder" in refusal(capsys, place, "val_path=folder")


@pytest.mark.parametrize("key", ["train_path", "val_path"])
def test_a_sequence_longer_than_the_models_positions_is_refused(place, capsys, key):
    write_json(place / "bad.json", [GOOD, {**GOOD, "question": "1" * 120}])
    message = refusal(capsys, place, f"{key}=bad.json")
    parts = ["bad.json", "problem 1", "133 tokens", "128 positions", "shorten"]
    assert [part for part in parts if part not in message] == []


def test_a_problem_of_several_files_is_named_by_its_file_and_its_index_there(place, capsys):
    write_json(place / "long.json", [GOOD, {**GOOD, "question": "1" * 120}])
    assert "long.json: problem 1 makes a sequence" in refusal(capsys, place, "train_path=[train.json,long.json]")
    write_json(place / "bad.json", [GOOD, {**GOOD, "answer": 2}])
    assert 'bad.json: problem 1: "answer"' in refusal(capsys, place, "val_path=[valid.json,bad.json]")
    message = refusal(capsys, place, "val_path=[valid.json,missing.json,'hub:owner/name']")
    assert "val_path: 'missing.json' does not exist" in message and "'hub:owner/name' names no split" in message


def test_a_tokenizer_without_eos_is_refused(place, capsys, tmp_path_factory):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    folder = save_model(tmp_path_factory.mktemp("model") / "no_eos", tokenizer=tokenizer)
    assert "eos" in refusal(capsys, place, f"model_id={folder}")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["bad.yaml", "cannot read", "args/"]),
        (b"", ["bad.yaml", "key: value"]),
        (b"- name", ["bad.yaml", "key: value", "list"]),
        (b"just words", ["bad.yaml", "key: value", "str"]),
        (b"a: b: c", ["bad.yaml", "not valid YAML"]),
        (b"lr: 1\nseed: 2\n\n'lr': 3\n", ["bad.yaml", "'lr' is given twice, in lines 1 and 4"]),
        (b"name: [", ["bad.yaml", "not valid YAML"]),
        (b"name: \xe9", ["bad.yaml", "UTF-8"]),
        (b"base: nowhere.yaml", ["nowhere.yaml", "cannot read", "which base in "]),
        (b"base: bad.yaml", ["bad.yaml", "base"]),
    ],
)
def test_a_bad_yaml_file_is_refused(place, capsys, content, parts):
    if content is not None:
        (place / "bad.yaml").write_bytes(content)
    message = refusal(capsys, place, config="bad.yaml")
    assert [part for part in parts if part not in message] == []


def test_all_problems_are_named_at_once(place, capsys):
    before = snapshot(place)
    mistakes = ["num_epoch=3", "lr=fast", "uniform_prob=2", "coconut=True", "val_path=missing.json"]
    assert run.main(["config.yaml", *mistakes]) == 2
    message = capsys.readouterr().err
    for key in ("num_epoch:", "lr:", "uniform_prob:", "method:", "val_path:"):
        assert message.count(f"- {key}") == 1
    assert snapshot(place) == before


def test_a_name_that_is_too_long_is_refused_beside_a_missing_checkpoint(place, capsys):
    message = refusal(capsys, place, f"name={'n' * 300}", "load_model_path=missing")
    assert "name: expected" in message and "load_model_path: 'missing' does not exist" in message


def test_no_method_at_all_is_refused(place, capsys):
    values = yaml.safe_load((place / "config.yaml").read_text())
    values.pop("method")
    (place / "config.yaml").write_text(yaml.safe_dump(values))
    message = refusal(capsys, place)
    assert "none chosen" in message
    assert "no_thoughts" in message


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["num_epoch=3"], id="config"),
        pytest.param(["train_path=bad.json"], id="data", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_ends_the_real_program_with_code_2(place, command):
    (place / "bad.json").write_text("[")
    before = snapshot(place)
    finished = run_script("config.yaml", *command, cwd=place, timeout=120)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert command[0].split("=")[1 if "bad" in command[0] else 0] in finished.stderr
    assert snapshot(place) == before


@pytest.mark.slow
def test_torchrun_shows_a_mistake_once(place):
    finished = run_script("config.yaml", "num_epoch=3", processes=2, cwd=place, timeout=120)
    assert finished.returncode != 0
    assert finished.stderr.count("unknown key") == 1


# --- what works -------------------------------------------------------------------------------------------------------

OFFICIAL = """
project: coconut
save_path: {save_path}
name: official
only_eval: False

coconut: {coconut}
cot: {cot}
no_thoughts: False
no_cot: False

c_thought: 2
epochs_per_stage: 3
max_latent_stage: 3
pad_latent_to_max: True
save_only_improve: False
uniform_prob: 0.0
model_id: {model}
load_model_path: None
seed: 0
resume: 3
bf16: False
train_path: train.json
val_path: valid.json
reset_optimizer: True
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 25
lr: !!float "1e-4"
weight_decay: 0.01
"""


@pytest.mark.parametrize("method", ["coconut", "cot"])
def test_an_official_yaml_file_is_read_unchanged(place, model, method):
    booleans = {name: name == method for name in ("coconut", "cot")}
    (place / "official.yaml").write_text(OFFICIAL.format(save_path="here", model=model, **booleans))
    config = load_config("official.yaml")
    assert config.method == method
    assert config.load_model_path is None
    assert (config.lr, type(config.lr)) == (1e-4, float)
    assert (config.c_thought, config.resume, config.reset_optimizer) == (2, 3, True)


@pytest.mark.parametrize("text", ['!!float "1e-4"', "1e-4", "1.0e-4", "0.0001", '"1e-4"'])
def test_every_spelling_of_a_rate(place, text):
    (place / "rate.yaml").write_text(f"base: config.yaml\nlr: {text}\n")
    assert load_config("rate.yaml").lr == 1e-4
    assert load_config("config.yaml", [f"lr={text}"]).lr == 1e-4


@pytest.mark.parametrize("word", ["None", "null", "~", ""])
def test_every_spelling_of_none(place, word):
    assert load_config("config.yaml", [f"load_model_path={word}"]).load_model_path is None


def test_a_false_boolean_never_conflicts_and_a_true_one_names_the_method(place):
    false = dict.fromkeys(("coconut", "cot", "no_thoughts", "no_cot"), False)
    for method in ("coconut", "no_curriculum", "pause_token"):
        assert load_config("config.yaml", words({**false, "method": method})).method == method
    assert load_config("config.yaml", ["cot=True"]).method == "cot"  # says the same twice
    for name in false:
        assert load_config("config.yaml", words({**false, "method": None, name: True})).method == name
        with pytest.raises(UserError, match="two methods"):
            load_config("config.yaml", words({**false, "method": "no_curriculum", name: True}))


def test_home_and_variables_in_paths_are_expanded_as_by_a_shell(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("DATA", str(place))
    (place / "child.yaml").write_text("base: ~/config.yaml\nsave_path: ~/runs\ntrain_path: $DATA/train.json\n")
    words = ["val_path=${DATA}/valid.json", "data_cache=~/cache", "project=~/p"]
    config = load_config("child.yaml", words)
    assert config.save_path == f"{place}/runs" and config.data_cache == f"{place}/cache"
    assert (config.train_path, config.val_path) == (f"{place}/train.json", f"{place}/valid.json")
    assert config.project == "~/p"  # no path
    several = load_config("child.yaml", [*words, "train_path=[~/train.json, $DATA/valid.json]"])
    assert several.train_path == [f"{place}/train.json", f"{place}/valid.json"]


def test_words_win_over_the_file_and_the_file_over_its_base(place):
    (place / "child.yaml").write_text("base: config.yaml\nseed: 5\nlr: 0.5\n")
    config = load_config("child.yaml", ["lr=0.25", "--bf16=true"])
    assert (config.name, config.seed, config.lr, config.bf16) == ("r", 5, 0.25, True)


def test_config_takes_any_subset_and_refuses_the_rest():
    assert Config({}).lr == 1e-4
    assert Config({"cot": True}).method == "cot"
    assert Config({"lr": 1}).lr == 1.0
    for values in ({"lrr": 1}, {"lr": "x"}, {"uniform_prob": 2}, {"num_epochs": None}):
        with pytest.raises(ValueError, match=next(iter(values))):
            Config(values)


def test_config_yaml_loads_again_as_the_same_config(place):
    changes = words({"lr": 3e-5, "logger": "tensorboard", "max_new_tokens": None, "max_grad_norm": 1})
    data = ["val_path=[valid.json, train.json]", "columns={question: problem}"]
    config = load_config("config.yaml", [*changes, "reset_optimizer=every_epoch", *data])
    (place / "again.yaml").write_text(yaml.safe_dump(config.resolved()))
    assert load_config("again.yaml") == config


def test_the_keys_that_a_continued_run_may_change():
    free = "project name save_path only_eval debug verbose samples logger trust_remote_code verify "
    free += "val_path data_cache data_workers "
    free += "num_epochs resume gradient_checkpointing compile parallel batch_size_eval max_new_tokens "
    free += "save_only_improve save_every_steps keep_checkpoints analyze numeric_answers "
    free += "eval_every_epochs eval_max_problems"
    assert set(free.split()) == FREE_KEYS


@pytest.mark.parametrize(
    ("values", "world_size", "steps", "problems"),
    [
        ({}, 1, 1, 32),
        ({"gradient_accumulation_steps": 3}, 2, 3, 192),
        ({"global_batch_size": 128}, 2, 2, 128),
        ({"global_batch_size": 128}, 4, 1, 128),
        ({"global_batch_size": 96, "gradient_accumulation_steps": 7}, 1, 3, 96),
    ],
)
def test_the_problems_of_an_optimizer_step(values, world_size, steps, problems):
    config = Config(values)
    assert config.accumulation_steps(world_size) == steps
    assert config.problems_per_step(world_size) == problems
    assert config == Config(values)


@pytest.mark.parametrize(("size", "world_size"), [(33, 1), (32, 2), (96, 2), (1, 1)])
def test_a_global_batch_that_the_processes_cannot_share_is_refused(size, world_size):
    message = f"global_batch_size: {size} is not a multiple of batch_size_training 32 x {world_size} processes"
    with pytest.raises(UserError, match=message):
        Config({"global_batch_size": size}).accumulation_steps(world_size)


# The table of official hyper-parameters; all have lr 1e-4, weight decay 0.01, batch 32, seed 0 and no mixing.
PAPER = {  # method, c_thought, epochs_per_stage, max_latent_stage, save_only_improve, reset_optimizer, resume, epochs
    "gsm_cot": ("cot", 0, 1, 0, True, False, 0, 25),
    "gsm_coconut": ("coconut", 2, 3, 3, False, True, 3, 25),
    "gsm_coconut_eval": ("coconut", 2, 3, 3, False, True, 15, 25),
    "prontoqa_coconut": ("coconut", 1, 5, 6, False, True, 0, 50),
    "prontoqa_coconut_eval": ("coconut", 1, 5, 6, False, True, 40, 50),
    "prosqa_coconut": ("coconut", 1, 5, 6, False, True, 0, 50),
    "prosqa_coconut_eval": ("coconut", 1, 5, 6, False, True, 40, 50),
}


@pytest.mark.parametrize("experiment", PAPER)
def test_the_shipped_experiments_hold_the_papers_numbers(experiment):
    config = Config(read_yaml(REPOSITORY / "args" / f"{experiment}.yaml"))
    keys = ("method", "c_thought", "epochs_per_stage", "max_latent_stage", "save_only_improve", "reset_optimizer")
    assert tuple(getattr(config, key) for key in (*keys, "resume", "num_epochs")) == PAPER[experiment]
    assert (config.lr, config.weight_decay, config.batch_size_training) == (1e-4, 0.01, 32)
    assert (config.gradient_accumulation_steps, config.uniform_prob, config.seed) == (1, 0, 0)
    assert (config.pad_latent_to_max, config.bf16, config.debug) == (True, False, False)
    assert (config.project, config.model_id) == ("coconut", "openai-community/gpt2")
    evaluates = experiment.endswith("_eval")
    assert config.only_eval == evaluates
    data = experiment.split("_")[0]
    assert config.val_path == f"data/{data}_{'test' if evaluates else 'valid'}.json"
    assert config.train_path == f"data/{data}_train.json"
    starts_from = {"gsm_coconut": "checkpoints/gsm-cot/best"}
    if evaluates:
        starts_from = {experiment: f"checkpoints/{data}-coconut/best"}
    assert config.load_model_path == starts_from.get(experiment)


@pytest.mark.parametrize(("key", "value"), [("compile", True), ("lora_rank", 4)])
def test_what_does_not_go_with_shards_is_refused(place, capsys, key, value):
    message = refusal(capsys, place, "parallel=fsdp", f"{key}={value}")
    assert [part for part in (key, "parallel", "fsdp", "ddp") if part not in message] == []


def test_compiling_and_computing_blocks_again_are_refused_together(place, capsys):
    message = refusal(capsys, place, "compile=True", "gradient_checkpointing=block")
    assert [part for part in ("gradient_checkpointing", "compile") if part not in message] == []


def test_compiling_without_a_compiler_is_refused(place, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refusal(capsys, place, "compile=True")
    assert [part for part in ("compile", "CXX", "compile: False") if part not in message] == []


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [("logger", "tensorboard", "tensorboard"), ("lora_rank", 4, "peft"), ("analyze", True, "matplotlib")],
)
def test_a_missing_optional_package_is_named(key, value, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else name)
    config = Config({key: value} | ({} if key == "logger" else {"logger": "none"}))
    [problem] = missing_packages(config)
    assert problem.startswith(f"{key}: ") and f"pip install {package}" in problem
    config.only_eval = True
    assert missing_packages(config) == []
