"""What the README states as fact about sequences and config keys is what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from config import OFFICIAL_METHODS, Config
from curriculum import END, LATENT, METHODS, PAUSE, START
from dataset import get_cot_latent_dataset, get_question_latent_dataset
from helpers import EOS, REPOSITORY, byte_tokenizer
from pretrained import add_tokens
from tokens import tokenize_problems

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROBLEM = {"question": "2*3+4?", "steps": ["2*3=6", "6+4=10"], "answer": "10"}
SHORT = {START: "<start>", END: "<end>", LATENT: "<latent>", PAUSE: "<pause>", EOS: "<eos>", "\n": "⏎"}


def sequences(method: str, stage: int) -> tuple[str, str, str]:
    """A training sequence, as its unsupervised and supervised parts, and the prompt for generation."""
    config = Config({"method": method, "max_latent_stage": 2, "remove_all_when_remove_beyond": 9})
    config.update({"removal_smoothing_lambda": None})
    tokenizer = byte_tokenizer()
    add_tokens(tokenizer, method)
    placeholder = PAUSE if METHODS[method].placeholder == "pause" else LATENT
    ids = tokenizer.convert_tokens_to_ids([START, placeholder, END])
    options = {"no_special_marker": not METHODS[method].markers}
    examples = tokenize_problems([PROBLEM], tokenizer)
    [item] = get_cot_latent_dataset(stage, examples, config, *ids, **options)
    [prompt] = get_question_latent_dataset(stage, examples, config, *ids, **options)
    cut = sum(label == -100 for label in item["labels"])
    return tuple(
        show(tokenizer, part) for part in (item["input_ids"][:cut], item["input_ids"][cut:], prompt["input_ids"])
    )


def show(tokenizer, ids: list[int]) -> str:
    """Token ids as text with the short names of special tokens."""
    text = tokenizer.decode(ids)
    for token, short in SHORT.items():
        text = text.replace(token, short)
    return text


def sequence_rows() -> list[str]:
    """The README's block of sequences: what is not supervised | what is."""
    rows = []
    for method, kind in METHODS.items():
        stages = {"by stage": (0, 1, 2, 3), "by token": (0, 1, 6, 9)}.get(kind.steps, ("any",))
        for stage in stages:
            prompt, target, question = sequences(method, 0 if stage == "any" else stage)
            assert prompt == question  # generation starts where supervision does
            rows.append(f"{method:<17}{stage!s:<6}{prompt} | {target}")
    return rows


def config_rows() -> list[str]:
    """The README's table of config keys."""
    return [
        f"| `{option.name}` | {option.default} | {option.metadata['doc']} |"
        for option in fields(Config)
        if option.name not in OFFICIAL_METHODS
    ]


@pytest.mark.parametrize("row", sequence_rows())
def test_the_sequences_are_as_printed(row):
    assert row + "\n" in README


@pytest.mark.parametrize("row", config_rows())
def test_every_config_key_is_explained(row):
    assert row + "\n" in README


PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        assert not heading or heading in headings(place), target


def headings(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_name_files_that_exist(page):
    """Those that stand in indented blocks."""
    commands = re.findall(
        r"^    (?:.*&& )?((?:python|bash|torchrun) .*)$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    others = {"CONFIG.yaml", "run_experiment.py"}  # the user's, and one of ProntoQA's
    for word in re.findall(r"\b(?:\w+/)*[\w.]+\.(?:py|bash|yaml)\b", "\n".join(commands)):
        assert word in others or (REPOSITORY / word).exists(), word
