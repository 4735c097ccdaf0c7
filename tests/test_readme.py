"""README and docs agree with the code: sequences, config keys, results of the paper, links and commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import config_page
import pytest
import table1
import yaml

from components.pretrained import add_tokens
from components.tokenization import tokenize_problems
from config import Config, UserError
from curriculum import END, LATENT, METHODS, PAUSE, START
from dataset import get_cot_latent_dataset, get_question_latent_dataset
from helpers import EOS, REPOSITORY, byte_tokenizer
from stress import commands

README, METHODS_PAGE, CONFIG_PAGE = (
    (REPOSITORY / page).read_text(encoding="utf-8") for page in ("README.md", "docs/methods.md", "docs/config.md")
)
PROBLEM = {"question": "2*3+4?", "steps": ["2*3=6", "6+4=10"], "answer": "10"}
SHORT = {START: "<start>", END: "<end>", LATENT: "<latent>", PAUSE: "<pause>", EOS: "<eos>", "\n": "⏎"}


def sequences(method: str, stage: int) -> tuple[str, str, str]:
    """The unsupervised and the supervised part of a training sequence, and the prompt for generation."""
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
    """Decoded token ids, with special tokens abbreviated."""
    text = tokenizer.decode(ids)
    for token, short in SHORT.items():
        text = text.replace(token, short)
    return text


def sequence_rows() -> list[str]:
    """The lines of the block in docs/methods.md: unsupervised part | supervised part."""
    rows = []
    for method, kind in METHODS.items():
        stages = {"by stage": (0, 1, 2, 3), "by token": (0, 1, 6, 9)}.get(kind.steps, ("any",))
        for stage in stages:
            prompt, target, question = sequences(method, 0 if stage == "any" else stage)
            assert prompt == question  # generation starts where supervision does
            rows.append(f"{method:<17}{stage!s:<6}{prompt} | {target}")
    return rows


@pytest.mark.parametrize("row", sequence_rows())
def test_sequences_in_methods_page_match_code(row):
    assert row + "\n" in METHODS_PAGE


def test_config_page_is_up_to_date():
    assert config_page.page() == CONFIG_PAGE, "python scripts/config_page.py > docs/config.md writes it anew"


def test_config_schema_is_up_to_date():
    written = (REPOSITORY / "docs" / "config.schema.json").read_text(encoding="utf-8")
    assert config_page.schema() == written, "python scripts/config_page.py --schema > docs/config.schema.json"


TYPES = {"boolean": bool, "integer": int, "number": (int, float), "string": str, "null": type(None)}
TYPES |= {"array": list, "object": dict}


def fits(value, schema: dict) -> bool:
    """Whether a value fits a schema, as far as the config's schema goes."""
    if "anyOf" in schema:
        return any(fits(value, form) for form in schema["anyOf"])
    if not isinstance(value, TYPES.get(schema.get("type"), object)):
        return False
    if isinstance(value, bool) and schema.get("type") not in ("boolean", None):  # of Python, True is an int
        return False
    return (
        value in schema.get("enum", [value])
        and value == schema.get("const", value)
        and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
        and ("minimum" not in schema or value >= schema["minimum"])
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("maximum" not in schema or value <= schema["maximum"])
        and ("items" not in schema or (value != [] and all(fits(item, schema["items"]) for item in value)))
        and (
            "properties" not in schema
            or all(fits(value[key], schema["properties"].get(key, {"enum": []})) for key in value)
        )
    )


@pytest.mark.parametrize("path", sorted((REPOSITORY / "args").glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_files_name_the_schema_and_fit_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../docs/config.schema.json\n")
    keys = json.loads(config_page.schema())["properties"]
    assert [key for key, value in yaml.safe_load(text).items() if key not in keys or not fits(value, keys[key])] == []


@pytest.mark.parametrize(
    "text",
    [
        "lr: fast",
        "lr: 0",
        "lr: True",
        "num_epochs: 2.5",
        "num_epochs: True",
        "bf16: 1",
        "uniform_prob: 1.5",
        "method: cto",
        "logger: None",
        "reset_optimizer: sometimes",
        "max_new_tokens: 0",
        "seed: -1",
        "train_path: 5",
        "train_path: [a.json, 5]",
        "columns: problem",
        "columns: {quest: problem}",
        "columns: {question: 5}",
    ],
)
def test_schema_and_config_refuse_the_same(text):
    [(key, value)] = yaml.safe_load(text).items()
    assert not fits(value, json.loads(config_page.schema())["properties"][key])
    with pytest.raises(UserError, match=key):
        Config({key: value})


@pytest.mark.parametrize(
    "text",
    [
        *("lr: 1e-4", "lr: 1", "max_grad_norm: None", "lora_rank: null", "load_model_path: None", "method: None"),
        *("val_path: [a.json, b.json.gz]", "columns: {question: problem}", "columns: None", "columns: {}"),
    ],
)
def test_schema_and_config_take_the_same(text):
    [(key, value)] = yaml.safe_load(text).items()
    assert fits(value, json.loads(config_page.schema())["properties"][key])
    Config({key: value})


def test_paper_results_in_pages_match_table1():
    results = (REPOSITORY / "results/README.md").read_text(encoding="utf-8")
    for method in METHODS:
        paper = [table1.PAPER[data][method].split(" (")[0] for data in ("gsm", "prontoqa", "prosqa")]
        label = {"cot": "CoT", "no_cot": "no CoT", "icot": "iCoT", "coconut": "Coconut"}.get(method, method)
        [row] = [
            line for line in results.splitlines() if line.startswith(f"| {label.replace('_', ' ')} | {paper[0][0]}")
        ]
        assert [cell.replace(" ", "") for cell in row.split("|")][2:5] == paper
        rows = [line for line in README.splitlines() if line.startswith(f"| `{method}` |")]
        assert len(rows) == (method in ("cot", "coconut"))
        for row in rows:
            assert [cell.replace(" ", "") for cell in row.split("|")][2:5] == paper


PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted(REPOSITORY.glob("*/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_markdown_links_resolve(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        assert not heading or heading in headings(place), target


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_documented_commands_are_valid(page):
    for command in commands.commands(page):
        commands.check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/none.py",
        "python scripts/ask.py checkpoints/NAME/best --unknown",
        "torchrun --unknown 1 run.py args/ring_cot.yaml",
        "python run.py args/ring_cot.yaml unknown=1",
        "python run.py args/none.yaml",
    ],
)
def test_invalid_command_is_detected(command):
    with pytest.raises(ValueError, match=r"unknown|none\.(py|yaml)"):
        commands.check(command)
