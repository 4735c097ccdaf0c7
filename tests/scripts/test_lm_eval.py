"""scripts/lm_eval_coconut.py: generations, log-likelihoods and answers in lm-evaluation-harness."""

import runpy
import sys
from types import SimpleNamespace

import lm_eval_coconut
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from config import UserError
from helpers import REPOSITORY, write_json
from helpers.checkpoints import METHODS, PROMPTS, expected_ids


def instances(*requests) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=request) for request in requests]


def test_lm_eval_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(REPOSITORY / "scripts" / "lm_eval_coconut.py"), run_name="__main__")
    assert raised.value.code == 2
    assert "lm_eval.__main__ is not installed; pip install -r requirements-extra.txt" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_lm_eval_generations_and_log_likelihoods_match_coconut(save_path, name):
    folder = save_path / name / "best"
    model = lm_eval_coconut.CoconutLM(str(folder), batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [row[-6:] for row in expected_ids(folder)]  # without markers and thoughts
    options = {"until": [], "max_gen_toks": 6}
    texts = model.generate_until(instances(*((prompt, options) for prompt in PROMPTS)), disable_tqdm=True)
    assert texts == tokenizer.batch_decode(expected, skip_special_tokens=True)
    [cut] = model.generate_until(instances((PROMPTS[0], {**options, "until": [texts[0][2:4]]})), True)
    assert cut == texts[0].split(texts[0][2:4])[0]
    prompts = [model.prompt(prompt)["input_ids"] for prompt in PROMPTS]
    pairs = [*zip(prompts, expected, strict=True), (prompts[0], tokenizer("### 7")["input_ids"])]
    scores = model._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [True, True, True, False]
    for (ids, new), (score, _) in zip(pairs, scores, strict=True):
        input_ids = torch.tensor([ids + new])  # (1, columns)
        loss = model.model(input_ids, torch.ones_like(input_ids), torch.tensor([[-100] * len(ids) + new])).loss
        assert score == pytest.approx(-loss.item() * len(new), rel=1e-4)
    [(score, _)] = model.loglikelihood(instances((PROMPTS[0], "### 7")), disable_tqdm=True)
    assert score == pytest.approx(scores[3][0], rel=1e-4)


def test_lm_eval_task_scores_answers_as_validation(save_path, tmp_path, monkeypatch):
    outputs = ["### 1,000", "6\n### 1000", "### 7", "1000"]
    problems = [{"question": f"{i}?", "steps": [], "answer": answer} for i, answer in enumerate(["1000"] * 4)]
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "prosqa_test.json", problems)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval_coconut.CoconutLM, "generate_until", lambda self, requests, **options: outputs)
    tasks = TaskManager(include_path=str(REPOSITORY / "scripts" / "lm_eval_tasks"), include_defaults=False)
    model = lm_eval_coconut.CoconutLM(str(save_path / "gpt2" / "best"))
    actual = simple_evaluate(model, tasks=["prosqa_thoughts"], task_manager=tasks, bootstrap_iters=0)
    assert actual["results"]["prosqa_thoughts"]["exact_match,answer"] == 0.5


def test_lm_eval_rejects_sampling_perplexity_and_an_automatic_batch_size(save_path):
    with pytest.raises(UserError, match="batch_size: expected a number, got 'auto'"):
        lm_eval_coconut.CoconutLM(str(save_path / "gpt2" / "best"), batch_size="auto")
    model = lm_eval_coconut.CoconutLM(str(save_path / "gpt2" / "best"))
    with pytest.raises(UserError, match="do_sample"):
        model.generate_until(instances((PROMPTS[0], {"do_sample": True})))
    with pytest.raises(UserError, match=r"the question: .* contains <\|latent\|>"):
        model.generate_until(instances(("1+2 <|latent|>\n", {})))
    with pytest.raises(UserError, match="perplexity"):
        model.loglikelihood_rolling(instances(("text",)))
