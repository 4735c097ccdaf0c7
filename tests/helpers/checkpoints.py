"""Tiny trained checkpoints of four methods, and the tokens that Coconut.generate produces with them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import run
from coconut import Coconut
from config import Config
from curriculum import END, LATENT, PAUSE, START
from dataset import MyCollator, get_dataset, get_question_latent_dataset, model_args
from helpers import byte_tokenizer, make_problems, save_model, tiny_llama, words, write_json

V = len(byte_tokenizer())  # vocabulary size without marker tokens
METHODS = {"gpt2": "coconut", "llama": "no_curriculum", "pause": "pause_token", "cot": "cot"}  # run: method
PROMPTS = ["1+2+3\n", "4+5+6+7+8\n", "9\n"]


def train_checkpoints(save_path: Path) -> Path:
    """Train the runs of METHODS for one epoch, with four thoughts or pause tokens; return save_path."""
    models = {name: save_model(save_path / f"{name}_model") for name in ("gpt2", "pause", "cot")}
    models["llama"] = save_model(save_path / "llama_model", tiny_llama(V, 128))
    data = write_json(save_path / "data.json", make_problems(8, steps=4))
    config = {"save_path": str(save_path), "logger": "none", "lr": 1e-3, "c_thought": 2, "max_latent_stage": 2}
    config |= {"train_path": data, "val_path": data, "max_new_tokens": 6, "resume": 2, "num_epochs": 3}
    (save_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, method in METHODS.items():
        values = {"name": name, "method": method, "model_id": models[name]}
        assert run.main([str(save_path / "config.yaml"), *words(values)]) == 0
    return save_path


def expected_ids(checkpoint: Path, prompts: list[str] = PROMPTS, **options) -> list[list[int]]:
    """Generate after each prompt alone, as in validation; return markers, thoughts and new tokens."""
    model, tokenizer = Coconut.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    description = json.loads((checkpoint / "coconut.json").read_text())
    config = Config({key: description[key] for key in ("method", "c_thought", "max_latent_stage")})
    problems = [{"question": prompt.removesuffix("\n"), "answer": "", "steps": []} for prompt in prompts]
    examples = get_dataset(write_json(checkpoint.parent / "prompts.json", problems), tokenizer)
    ids = description["token_ids"]
    order = [ids.get(START), ids.get(LATENT, ids.get(PAUSE)), ids.get(END)]
    features = get_question_latent_dataset(description["stage"], examples, config, *order, no_special_marker=not ids)
    rows = []
    for feature, question in zip(features, examples["question_tokenized"], strict=True):
        batch = MyCollator(tokenizer, model.latent_token_id)([feature])
        [row] = model.eval().generate(**model_args(batch), max_new_tokens=6, **options).tolist()
        rows.append(row[len(question) :])
    return rows


def load(checkpoint: Path, **options):
    """Load a checkpoint in transformers with trust_remote_code; return model, tokenizer, and PROMPTS as a batch."""
    lm = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    return lm, tokenizer, tokenizer(PROMPTS, return_tensors="pt", padding=True)


def until_eos(rows: list[list[int]], eos: int) -> list[list[int]]:
    """Truncate each row before its first eos."""
    return [row[: row.index(eos)] if eos in row else row for row in rows]
