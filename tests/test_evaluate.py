"""Answer extraction, accuracy and CoT match, validation, and the predictions file."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

import evaluate
from components import files
from components.distributed import Processes
from components.errors import Interrupted, SaveError
from config import Config, UserError, load_config
from dataset import get_cot_latent_dataset, model_args
from evaluate import Validator, extract_answer, predict, until_eos, write_evaluation, write_predictions
from helpers import EOS, byte_tokenizer, make_problems, read_lines, save_model, snapshot, write_json
from run import set_up
from utils import StopRequest

KINDS = ("predictions", "metrics")  # files of an evaluation


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1+1=2\n### 2", "2"),
        ("### 1,234,567", "1234567"),
        ("### -5", "-5"),
        ("###  7 \n", "7"),
        ("###7", "7"),
        ("#1 of 2 ### 3 # 4", "4"),
        ("### two\nlines", "two\nlines"),
        ("### Tom is a lorpus.", "Tom is a lorpus."),
        ("###", ""),
        ("no mark", None),
        ("", None),
    ],
)
def test_extract_answer_returns_text_after_last_hash(text, answer):
    assert extract_answer(text) == answer


def judge(text, expected="7", steps=("1+2=3", "3+4=7"), method="cot", thoughts=0, **options):
    problem = {"question": "1+2+4", "answer": expected, "steps": list(steps)}
    tokenizer = byte_tokenizer()
    new = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return predict(problem, 5, new, thoughts, tokenizer, Config({"method": method, **options}))


@pytest.mark.parametrize(
    ("expected", "text", "correct"),
    [
        ("7", "### 7", True),
        ("7", "### 8", False),
        ("7", "7", False),
        ("1,000", "### 1000", True),
        ("1000", "### 1,000", True),
        ("-3", "### -3", True),
        ("-3", "### 3", False),
        (" 7 ", "### 7", True),
        ("7", "### 7 7", False),
        ("", "no mark", False),
        ("None", "no mark", False),
        ("18", "### 18.0", False),
        ("C#", "### C#", True),
        ("C#", "### F#", False),
        ("C#", "### C", False),
        ("#1", "### #1", True),
        ("#1", "### 1", False),
        ("#### 4", "### #### 4", True),
        ("#### 4", "### 4", False),
    ],
)
def test_answer_comparison_ignores_commas_and_whitespace(expected, text, correct):
    assert judge(text, expected)["correct"] is correct


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1+2=3\n3+4=7\n### 7", True),
        ("1+2=3\n3+4=7\n### 9", True),
        (" 1+2=3\n3+4=7 \n", True),
        ("1+2=3\n### 7", False),
        ("3+4=7\n1+2=3\n### 7", False),
        ("### 7", False),
    ],
)
def test_cot_match_requires_all_steps_before_first_hash(text, match):
    assert judge(text)["cot_match"] is match


@pytest.mark.parametrize(
    ("expected", "text", "correct"),
    [
        ("18", "### 18.0", True),
        ("1,000.50", "### 1000.5", True),
        ("18", "### 19", False),
        ("a", "### b", False),
        ("nan", "### NaN", False),
        ("18", "no mark", False),
    ],
)
def test_numeric_answers_compare_values(expected, text, correct):
    assert judge(text, expected, numeric_answers=True)["correct"] is correct


@pytest.mark.parametrize("steps", [("a#1", "b##"), ("a\n", "\n"), (" a ", "b")])
def test_cot_match_of_steps_with_hashes_and_outer_newlines(steps):
    written = "".join(step + "\n" for step in steps)
    assert judge(written + "### 7", steps=steps)["cot_match"] is True
    assert judge(written.replace("a", "x") + "### 7", steps=steps)["cot_match"] is False
    assert judge("### 7", steps=steps)["cot_match"] is (steps == ("\n", "\n"))


@pytest.mark.parametrize("steps", [[], [""]])
def test_cot_match_of_problem_without_steps(steps):
    assert judge("### 7", steps=steps)["cot_match"] is True


@pytest.mark.parametrize("method", ["coconut", "no_cot", "no_thoughts", "icot"])
def test_no_cot_match_for_methods_without_written_steps(method):
    assert "cot_match" not in judge("### 7", method=method)


def test_prediction_fields():
    expected = {"idx": 5, "question": "1+2+4", "expected": "7", "answer": "8", "correct": False, "new_tokens": 12}
    assert judge("### 8", method="coconut", thoughts=6) == expected | {"generated": "[6 thoughts]### 8"}
    assert judge("", method="coconut", thoughts=1)["generated"] == "[1 thought]"
    assert judge("### 8", method="no_cot")["generated"] == "### 8"


def test_until_eos_cuts_after_first_eos():
    assert until_eos([5, 6, 0, 0], 0, 4) == [5, 6, 0]
    assert until_eos([0, 0], 0, 4) == [0]
    assert until_eos([5, 6, 7, 8], 0, 4) == [5, 6, 7, 8]  # the limit ended it
    assert until_eos([5, 6], 0, 4) == [5, 6, 0]  # generate leaves out an eos that ends all rows at once
    assert until_eos([], 0, 4) == [0]


def test_write_predictions_writes_utf8_json_lines(tmp_path):
    predictions = [{"idx": 0, "question": "é\n\u2028 “quoted”"}, {"idx": 1, "answer": None}]
    write_predictions(predictions, tmp_path / "p.jsonl")
    text = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 2
    assert "é" in text


def test_evaluations_that_end_together_are_all_kept(tmp_path, monkeypatch):
    together = threading.Barrier(4)

    def write_together(predictions, path):
        together.wait(timeout=60)
        write_predictions(predictions, path)

    monkeypatch.setattr(evaluate, "write_predictions", write_together)
    with ThreadPoolExecutor(4) as pool:
        result = {"val_path": "data/test.json"}
        jobs = [pool.submit(write_evaluation, [{"idx": n}], result | {"n": n}, tmp_path / "eval") for n in range(4)]
    assert [job.exception() for job in jobs] == [None] * 4
    names = ["test", "test_2", "test_3", "test_4"]
    assert {path.stem for path in (tmp_path / "eval").iterdir()} == {f"{kind}_{n}" for n in names for kind in KINDS}
    for name in names:  # each file of metrics is beside its own predictions
        metrics = yaml.safe_load((tmp_path / "eval" / f"metrics_{name}.yaml").read_text())
        assert read_lines(tmp_path / "eval" / f"predictions_{name}.jsonl") == [{"idx": metrics["n"]}]


def test_failed_write_of_an_evaluation_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(SaveError):
        write_evaluation([{"idx": 0}], {"val_path": "data/test.json"}, tmp_path / "eval")
    assert not list((tmp_path / "eval").iterdir())


def test_write_atomic_by_several_processes_at_once(tmp_path, monkeypatch):
    together, replace = threading.Barrier(4), files.os.replace

    def replace_together(*paths):
        together.wait(timeout=60)
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", replace_together)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(files.write_atomic, tmp_path / "f", str(n) * 9) for n in range(4)]
    assert [job.exception() for job in jobs] == [None] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() in {str(n) * 9 for n in range(4)}


def test_atomic_directory_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Else a power failure could leave a checkpoint with empty files under its final name."""
    synced, replace = set(), os.replace

    def fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def check(source, target):
        paths = [Path(source), *Path(source).rglob("*")]
        assert {str(path) for path in paths} <= synced
        replace(source, target)
        moved.append(Path(target).name)

    moved = []
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", check)
    with files.atomic_directory(tmp_path / "checkpoint_1") as partial:
        (partial / "custom_generate").mkdir()
        (partial / "custom_generate" / "generate.py").write_text("")
        (partial / "model.safetensors").write_text("weights")
    assert moved == ["manifest.json", "checkpoint_1"]
    assert str(tmp_path) in synced  # and the new name


# --- validation -------------------------------------------------------------------------------------------------------


def valid_problems() -> list[dict]:
    return make_problems(3) + make_problems(3, steps=4, seed=1) + make_problems(1, steps=1, seed=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    problems = valid_problems()
    config = {"name": "r", "model_id": save_model(place / "model"), "logger": "none", "max_new_tokens": 6}
    config |= {"train_path": write_json(place / "train.json", problems[:1]), "save_path": str(place / "runs")}
    config |= {"val_path": write_json(place / "valid.json", problems)}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    return place


def prepare(place, *words) -> Validator:
    command = ["method=coconut", "max_latent_stage=3", "pad_latent_to_max=False", *words]
    validator = set_up(load_config(str(place / "config.yaml"), command), Processes(), StopRequest()).validator
    with torch.no_grad():  # the markers' new rows equal that of "<<", and a tie has no greedy token
        validator.model.base_causallm.get_output_embeddings().weight[-3:].zero_()
    return validator


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("stage", [0, 2, 4])
def test_validation_does_not_depend_on_batch_size_eval(place, size, stage):
    validator = prepare(place, f"batch_size_eval={size}")
    evaluation = validator.validate(stage)
    assert [p["idx"] for p in evaluation.predictions] == list(range(7))
    assert [p["question"] for p in evaluation.predictions] == [p["question"] for p in validator.problems]
    alone = prepare(place, "batch_size_eval=1").validate(stage)
    assert evaluation.predictions == alone.predictions
    assert evaluation.loss == pytest.approx(alone.loss, rel=1e-6)


def test_validation_loss_is_mean_over_supervised_tokens(place):
    validator = prepare(place, "batch_size_eval=3")
    total = count = 0
    for item in get_cot_latent_dataset(1, validator.examples, validator.config, **validator.sequence_tokens):
        batch = validator.collate([item])
        n = (batch["labels"] != -100).sum().item()
        inputs = {key: value for key, value in batch.items() if key != "idx"}
        total, count = total + validator.model(**inputs).loss.item() * n, count + n
    assert validator.validate(1).loss == pytest.approx(total / count, rel=1e-6)


def test_validation_accuracy_and_cot_match(place, monkeypatch):
    validator = prepare(place, "method=cot", "batch_size_eval=2")
    tokenizer, problems = validator.pretrained.tokenizer, validator.problems
    texts = {problem["question"]: "\n".join([*problem["steps"], "### " + problem["answer"]]) for problem in problems}
    texts[problems[0]["question"]] = "### " + problems[0]["answer"]  # right without steps
    texts[problems[3]["question"]] += "1"  # wrong after the right steps
    texts[problems[4]["question"]] = "?"

    def generate(input_ids, attention_mask, max_new_tokens, **_):
        questions = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in input_ids]
        rows = [tokenizer(texts[question])["input_ids"] for question in questions]
        length = max(map(len, rows)) + 1
        new = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(validator.model, "generate", generate)
    evaluation = validator.validate(0)
    assert evaluation.accuracy == pytest.approx(5 / 7)
    assert evaluation.cot_match == pytest.approx(5 / 7)
    assert [p["correct"] for p in evaluation.predictions] == [True, True, True, False, False, True, True]
    assert evaluation.new_tokens == pytest.approx(sum(len(text) + 1 for text in texts.values()) / 7)
    named = {"eval/loss", "eval/acc", "eval/cot_em", "eval/new_tokens", "eval/seconds"}
    assert set(evaluation.metrics()) == named
    assert "accuracy 71.4%, CoT match 71.4%" in evaluation.summary()


def test_data_without_steps_can_be_evaluated_where_nothing_needs_them(place):
    bare = write_json(place / "bare.json", [{"question": "1+2", "answer": "3"}] * 2)
    assert prepare(place, "method=no_curriculum", "pad_latent_to_max=True", f"val_path={bare}", f"train_path={bare}")
    words = ["method=cot", f"load_model_path={place / 'model'}", "only_eval=True", f"val_path={bare}"]
    validator = set_up(load_config(str(place / "config.yaml"), words), Processes(), StopRequest())
    assert validator.validate(0).cot_match is None
    for words in (["method=cot"], ["method=no_curriculum"]):
        with pytest.raises(UserError, match='problem 0: has no "steps"'):
            prepare(place, *words, f"val_path={bare}")


def started(place, *words) -> str:
    """Set a run up, which is to write nothing."""
    before = snapshot(place)
    prepare(place, *words)
    assert snapshot(place) == before


def test_start_warns_of_references_longer_than_max_new_tokens(place, capsys):
    started(place, "max_new_tokens=11")  # "7+2=9\n9+1=10\n### 10" and eos: 18 tokens at stage 0
    lengths = [len("".join(step + "\n" for step in p["steps"]) + "### " + p["answer"]) for p in valid_problems()]
    assert (
        f"warning: max_new_tokens: the outputs of {sum(n > 11 for n in lengths)} of 7 problems of val_path are longer "
        f"than 11 tokens, so they cannot be right; set max_new_tokens: {max(lengths)}\n"
    ) in capsys.readouterr().out
    started(place, f"max_new_tokens={max(lengths)}")
    assert "max_new_tokens:" not in capsys.readouterr().out.replace("max_new_tokens: 6", "")


def test_start_warns_of_answers_that_can_never_be_right_and_refuses_if_all_are(place, capsys):
    ends = {"question": "1+2", "steps": [EOS], "answer": "3"}
    data = write_json(place / "ends.json", [ends, *make_problems(2)])
    started(place, "method=cot", f"val_path={data}")
    assert "1 of 3 answers can never be right" in capsys.readouterr().out
    started(place, "method=no_cot", f"val_path={data}")  # its sequences have no steps
    assert "never be right" not in capsys.readouterr().out
    data = write_json(place / "ends.json", [ends])
    with pytest.raises(UserError, match=r"val_path: .* 1 of 1 answers can never be right"):
        started(place, "method=cot", f"val_path={data}")


def test_start_warns_of_validation_questions_in_training_data_and_of_stages_beyond_the_steps(place, capsys):
    problems = make_problems(6, seed=5)
    train = write_json(place / "other.json", problems)
    started(place, f"train_path={train}")
    out = capsys.readouterr().out
    assert "questions of val_path" not in out and "steps, so" not in out  # one epoch, at stage 0
    valid = write_json(place / "both.json", [problems[0], problems[3], {**problems[1], "question": "9+9"}])
    started(place, f"train_path={train}", f"val_path={valid}", "num_epochs=5")
    out = capsys.readouterr().out
    assert "warning: 2 of 3 questions of val_path are in train_path too" in out
    assert "no problem of train_path has more than 2 steps, so stage 3 removes nothing; set max_latent_stage: 2" in out
    started(place, f"train_path={train}", f"val_path={valid}", "num_epochs=5", "method=cot")
    assert "removes nothing" not in capsys.readouterr().out


def test_validation_uses_eval_mode_and_no_gradients(place):
    validator = prepare(place)
    validator.model.train()
    validator.validate(2)
    assert not validator.model.training
    assert all(p.grad is None for p in validator.model.parameters())


def test_signal_ends_a_validation_after_its_batch(place, monkeypatch):
    validator, batches = prepare(place, "batch_size_eval=1"), []

    def receive(batch):
        batches.append(batch)
        validator.stop.signal = signal.SIGTERM
        return model_args(batch)

    monkeypatch.setattr(evaluate, "model_args", receive)
    for part in (validator.mean_loss, validator.predict_all):
        validator.stop.signal = 0
        with pytest.raises(Interrupted):
            part(0)
    assert len(batches) == 2


def test_generated_text_states_number_of_thoughts(place):
    evaluation = prepare(place).validate(0)
    assert not any("thought" in p["generated"] for p in evaluation.predictions)
    evaluation = prepare(place).validate(2)
    starts = [p["generated"].split("]")[0] for p in evaluation.predictions]
    assert starts == ["[2 thoughts"] * 6 + ["[1 thought"]


def test_write_predictions_round_trip(place, tmp_path):
    evaluation = prepare(place).validate(0)
    write_predictions(evaluation.predictions, tmp_path / "p.jsonl")
    assert read_lines(tmp_path / "p.jsonl") == evaluation.predictions
