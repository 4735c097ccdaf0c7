"""scripts/ask.py: output, options, stdin, errors."""

import io
import json
import shutil
from pathlib import Path

import analyze
import ask
import convert
import hub
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from coconut import Coconut
from curriculum import START
from helpers.checkpoints import METHODS, PROMPTS, expected_ids, until_eos


def ask_json(capsys, *argv) -> list[dict]:
    """Run ask.py --json; return its output."""
    ask.main([str(arg) for arg in (*argv, "--json")])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_ask_output_matches_coconut_generate(save_path, capsys, name):
    folder = save_path / name / "best"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [result] = ask_json(capsys, folder, "1+2+3")
    middle, thoughts = (0, "") if name == "cot" else (6, "" if name == "pause" else "[4 thoughts]")
    [new] = until_eos([row[middle:] for row in expected_ids(folder, PROMPTS[:1])], tokenizer.eos_token_id)
    assert result["question"] == "1+2+3"
    assert result["generated"] == thoughts + tokenizer.decode(new)
    assert result["new_tokens"] == min(len(new) + 1, 6) + (4 if thoughts else 0)
    assert result["seconds"] > 0


def test_ask_thoughts_option(save_path, capsys):
    folder = save_path / "gpt2" / "best"
    for count, shown in ((1, "[1 thought]"), (7, "[7 thoughts]")):
        [result] = ask_json(capsys, folder, "1+2+3", "--thoughts", count)
        assert result["generated"].startswith(shown)
    [result] = ask_json(capsys, folder, "1+2+3", "--thoughts", 0)
    assert "thought" not in result["generated"]


def test_ask_show_thoughts_prints_top_tokens(save_path, capsys):
    folder = save_path / "gpt2" / "best"
    [result] = ask_json(capsys, folder, "1+2+3", "--show-thoughts")
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():  # no thought precedes the first one, so the plain model computes it too
        prompt = tokenizer("1+2+3\n" + START, return_tensors="pt", return_token_type_ids=False)
        expected = lm(**prompt).logits[0, -1].softmax(-1).max(-1)
    assert [len(tokens) for tokens in result["thoughts"]] == [5] * 4
    token, probability = result["thoughts"][0][0]
    assert token == tokenizer.decode(expected.indices)
    assert probability == pytest.approx(expected.values.item(), rel=1e-4)
    ask.main([str(folder), "1+2+3", "--show-thoughts"])
    assert "thought 4: " in capsys.readouterr().out


def test_checkpoint_is_found_by_file_in_place_of_the_link_by_run_and_by_hub_name(
    save_path, tmp_path, capsys, monkeypatch
):
    [expected] = ask_json(capsys, save_path / "gpt2" / "best", "1+2+3")
    run = shutil.copytree(save_path / "gpt2", tmp_path / "run", symlinks=True)
    name = (run / "best").readlink().name
    (run / "best").unlink()
    (run / "best").write_text(name + "\n")  # as a run writes it on a file system without links
    cached, revision = tmp_path / "cache" / "models--owner--name", "0123456789" * 4  # as huggingface_hub stores it
    hub.prepare(run / "best", tmp_path / "pushed", "owner/name", None)
    shutil.copytree(tmp_path / "pushed", cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cached.parent))
    for checkpoint in (run / "best", run, "owner/name"):
        [result] = ask_json(capsys, checkpoint, "1+2+3")  # a note on stdout would not be JSON
        assert result["generated"] == expected["generated"], checkpoint
        convert.main(["to-official", str(checkpoint), str(tmp_path / f"file_of_{Path(checkpoint).name}")])
        capsys.readouterr()
    assert analyze.run_data(str(run), None) == analyze.run_data(str(save_path / "gpt2" / "best"), None)
    with pytest.raises(SystemExit) as raised:
        ask.main(["owner/none", "1+2"])
    assert raised.value.code == 2 and "'owner/none' is neither in" in capsys.readouterr().err


def test_ask_reads_questions_from_stdin(save_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2+3\n\n 4+5 \n"))
    assert [result["question"] for result in ask_json(capsys, save_path / "cot" / "best")] == ["1+2+3", "4+5"]


@pytest.mark.parametrize(("last", "terminal"), [("exit", False), ("exit", True), ("", True)])
def test_exit_and_in_a_terminal_an_empty_line_end_the_session(save_path, capsys, monkeypatch, last, terminal):
    monkeypatch.setattr("sys.stdin", stdin := io.StringIO(f"1+2+3\n{last}\n4+5\n"))
    stdin.isatty = lambda: terminal
    ask.main([str(save_path / "cot" / "best")])
    assert capsys.readouterr().out.count("answer: ") == 1


def test_ask_takes_best_of_a_run(save_path, capsys):
    of_run, of_best = (ask_json(capsys, save_path / folder, "1+2+3")[0] for folder in ("gpt2", "gpt2/best"))
    assert of_run["generated"] == of_best["generated"]


@pytest.mark.parametrize("name", ["cot", "pause"])
def test_show_thoughts_of_a_method_without_them_says_so(save_path, capsys, name):
    ask.main([str(save_path / name / "best"), "1+2+3", "--show-thoughts"])
    assert "has no thoughts to show" in capsys.readouterr().err


def test_ask_skips_too_long_question_and_exits_with_2(save_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2\n" + "1+" * 80 + "\n4+5\n"))
    with pytest.raises(SystemExit) as raised:
        ask.main([str(save_path / "gpt2" / "best"), "--json"])
    out, err = capsys.readouterr()
    assert raised.value.code == 2 and err.count("error: ") == 1
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["1+2", "4+5"]


@pytest.mark.parametrize("name", ["gpt2", "pause", "cot"])
def test_ask_takes_a_question_as_text_and_survives_what_is_none(save_path, capsys, monkeypatch, name):
    lines = b"1+2\n1+2 <|latent|>\n\xff\xfe 1\n<|start-latent|>\n4+5\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    with pytest.raises(SystemExit) as raised:
        ask.main([str(save_path / name / "best"), "--json"])
    out, err = capsys.readouterr()
    assert raised.value.code == 2 and err.count("error: the question: ") == 3
    assert "contains <|latent|>, which" in err and "lone surrogate" in err
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["1+2", "4+5"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gpt2_model", "1+2"], "coconut.json"),
        (["nowhere", "1+2"], "nowhere does not exist"),
        (["cot/best", "1+2", "--thoughts", "2"], "cot"),
        (["gpt2/best", "1+2", "--thoughts", "-1"], "--thoughts"),
        (["gpt2/best", "1+" * 80], "128"),
        (["gpt2/best", ""], "empty"),
        (["a question in place of the checkpoint? " * 9], "does not exist"),
    ],
)
def test_ask_rejects_invalid_arguments(save_path, capsys, argv, message):
    with pytest.raises(SystemExit) as raised:
        ask.main([str(save_path / argv[0]), *argv[1:]])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_ask_names_what_a_saved_model_does_not_say(save_path, tmp_path, capsys):
    best = save_path / "gpt2" / "best"
    model, tokenizer = Coconut.from_pretrained(best), AutoTokenizer.from_pretrained(best)
    model.save_pretrained(tmp_path / "with")
    description, model.description = model.description, {}
    model.save_pretrained(tmp_path / "without", thoughts=4)
    for folder in (tmp_path / "with", tmp_path / "without"):
        tokenizer.save_pretrained(folder)
    assert (
        ask_json(capsys, tmp_path / "with", "1+2+3")[0]["generated"] == ask_json(capsys, best, "1+2+3")[0]["generated"]
    )
    with pytest.raises(SystemExit) as raised:
        ask.main([str(tmp_path / "without"), "1+2+3"])
    assert raised.value.code == 2
    assert "coconut.json has no method, c_thought, max_latent_stage, stage" in capsys.readouterr().err
    (tmp_path / "with" / "coconut.json").write_text(json.dumps(description | {"method": "cocoon"}))
    with pytest.raises(SystemExit):
        ask.main([str(tmp_path / "with"), "1+2+3"])
    assert "method: expected one of cot, " in capsys.readouterr().err
