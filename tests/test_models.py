"""The trained models in models/ are as accurate as their page says, on the problems beside them."""

import json
from itertools import islice

import mini
import pytest
import torch

from components.files import verify_manifest
from dataset import MyCollator, model_args
from evaluate import extract_answer, open_checkpoint
from helpers import REPOSITORY

MODELS = REPOSITORY / "models"
PROBLEMS = json.loads((MODELS / "mini_problems.json").read_text(encoding="utf-8"))
NAMES = sorted(path.name for path in MODELS.iterdir() if (path / "coconut.json").exists())


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_is_as_accurate_as_recorded(name):
    page = (MODELS / "README.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    assert verify_manifest(MODELS / name) is None
    code = (MODELS / name / "custom_generate" / "generate.py").read_text(encoding="utf-8")
    assert code == (REPOSITORY / "components" / "custom_generate.py").read_text(encoding="utf-8")  # as export writes it
    checkpoint = open_checkpoint(str(MODELS / name))
    model, tokenizer = checkpoint.model.cpu(), checkpoint.pretrained.tokenizer
    prompts = checkpoint.prompts([problem["question"] for problem in PROBLEMS])
    batch = model_args(MyCollator(tokenizer, model.latent_token_id)(prompts))
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=checkpoint.config.answer_limit)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(extract_answer(text) == problem["answer"] for text, problem in zip(texts, PROBLEMS, strict=True))
    assert right == pytest.approx(int(row.split("|")[3]), abs=2)  # other kernels round differently


def test_shipped_problems_are_the_first_of_the_test_set():
    first = mini.SPLITS["valid"]
    assert list(islice(mini.make_problems(mini.SEED), first, first + len(PROBLEMS))) == PROBLEMS
