"""Asks a checkpoint, and prints what it writes, thinks and answers.

    python scripts/ask.py checkpoints/gsm-coconut/best "Ann has 3 boxes of 4 pens. How many pens are there?"
    python scripts/ask.py checkpoints/gsm-coconut/best                 a question on each line of the input
    python scripts/ask.py CHECKPOINT QUESTION --thoughts 3             other than it was trained with
    python scripts/ask.py CHECKPOINT QUESTION --show-thoughts          the tokens that each thought is closest to
    python scripts/ask.py CHECKPOINT QUESTION --json                   for programs, a line for each question

Prompts are made and answers read as in validation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from build import inputs  # noqa: E402
from coconut import Coconut  # noqa: E402
from config import Config, UserError  # noqa: E402
from curriculum import METHODS  # noqa: E402
from dataset import MyCollator, get_question_latent_dataset  # noqa: E402
from evaluate import predict, until_eos  # noqa: E402
from export import DESCRIPTION  # noqa: E402
from pretrained import Pretrained, load_pretrained, read_description  # noqa: E402
from tokens import tokenize_chunk  # noqa: E402

TOP = 5  # tokens that are shown of each thought


@dataclass
class Asked:
    """A checkpoint that is being asked: its model, and the config and stage by which its prompts are made."""

    pretrained: Pretrained
    model: Coconut
    config: Config
    stage: int


def open_checkpoint(path: str, thoughts: int | None) -> Asked:
    """Loads a checkpoint. Its prompts hold `thoughts` thoughts or pauses (None: as many as it was trained with)."""
    description = read_description(path)
    if not description:
        remedy = "give a checkpoint of a run, such as checkpoints/NAME/best"
        raise UserError(f"{path} holds no {DESCRIPTION}, so it is no checkpoint of ours; {remedy}")
    # A question does not tell its number of steps, so pad_latent_to_max keeps its default, True.
    values = {key: description[key] for key in ("method", "c_thought", "max_latent_stage")}
    stage = description["stage"]
    if thoughts is not None:
        if not METHODS[values["method"]].placeholder:
            raise UserError(f"--thoughts: {path} was trained with method {values['method']}, which has none")
        values, stage = values | {"c_thought": 1, "max_latent_stage": thoughts}, thoughts
    config = Config(values | {"max_new_tokens": description.get("max_new_tokens")})
    pretrained = load_pretrained(config, path)
    model = pretrained.coconut().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Asked(pretrained, model, config, stage)


def prompt(asked: Asked, question: str) -> dict:
    """The prompt as validation makes it: input_ids, attention_mask, position_ids. Raises UserError where the model has
    too few positions."""
    tokenizer, method = asked.pretrained.tokenizer, asked.config.method
    [example] = tokenize_chunk([{"question": question, "answer": "", "steps": []}], 0, tokenizer).to_pylist()
    ids, plain = asked.pretrained.prompt_ids(method), not METHODS[method].markers
    prompts = get_question_latent_dataset(asked.stage, [], asked.config, *ids, no_special_marker=plain)
    item = prompts.build(example)
    limit, length = getattr(asked.pretrained.lm.config, "max_position_embeddings", None), len(item["input_ids"])
    if limit and length > limit:
        raise UserError(f"the question: {length} tokens with thoughts, the model takes {limit}")
    return item


def ask(asked: Asked, question: str, show_thoughts: bool = False) -> dict:
    """What the model says: question, generated, answer, new_tokens, seconds, and with show_thoughts their tokens."""
    started, model, limit = time.perf_counter(), asked.model, asked.config.answer_limit
    batch = inputs(MyCollator(asked.pretrained.tokenizer, model.latent_token_id)([prompt(asked, question)]))
    [output] = model.generate(**batch, max_new_tokens=limit).tolist()
    seconds = time.perf_counter() - started
    new = until_eos(output[batch["input_ids"].shape[1] :], model.eos_token_id, limit)
    thoughts = (batch["input_ids"] == model.latent_token_id).sum().item()
    problem = {"question": question, "answer": "", "steps": []}
    said = predict(problem, 0, new, thoughts, asked.pretrained.tokenizer, asked.config.method)
    said = {key: said[key] for key in ("question", "generated", "answer", "new_tokens")} | {"seconds": seconds}
    return said | ({"thoughts": closest_tokens(asked, batch["input_ids"][0])} if show_thoughts else {})


@torch.no_grad()
def closest_tokens(asked: Asked, input_ids: torch.Tensor) -> list[list[tuple[str, float]]]:
    """For each thought of a prompt (columns,), its most probable tokens by the vocabulary projection."""
    states = asked.model.inputs_embeds(input_ids)[input_ids == asked.model.latent_token_id]  # (thoughts, hidden)
    top = asked.model.logits(states).softmax(-1).topk(TOP)  # (thoughts, TOP)
    decode = asked.pretrained.tokenizer.decode
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(decode(id), p) for id, p in zip(ids, ps, strict=True)] for ids, ps in pairs]


def format_answer(said: dict) -> str:
    """What the model said as text."""
    lines = [said["generated"]]
    for number, tokens in enumerate(said.get("thoughts", []), 1):
        lines.append(f"thought {number}: " + "  ".join(f"{token!r} {p:.2f}" for token, p in tokens))
    lines.append(f"answer: {said['answer']}   ({said['new_tokens']} tokens, {said['seconds']:.2f} s)")
    return "\n".join(lines)


def questions() -> Iterator[str]:
    """The lines of the input; at a terminal they can be edited, and earlier ones come back with the arrow keys."""
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if line := input("question: " if sys.stdin.isatty() else "").strip():
                yield line


def count(text: str) -> int:
    """A number of thoughts."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of thoughts: 0 or more")
    return int(text)


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, such as checkpoints/NAME/best")
    parser.add_argument("question", nargs="?", help="without it, each line of the input is one")
    parser.add_argument("--thoughts", type=count, help="how many thoughts (or pauses)")
    parser.add_argument("--show-thoughts", action="store_true", help="the tokens that each thought is closest to")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each question")
    arguments = parser.parse_args(words)
    try:
        asked = open_checkpoint(arguments.checkpoint, arguments.thoughts)
        for question in [arguments.question] if arguments.question else questions():
            said = ask(asked, question, arguments.show_thoughts)
            print(json.dumps(said, ensure_ascii=False) if arguments.json else format_answer(said), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
