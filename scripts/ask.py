"""Asks a checkpoint, and prints what it writes, thinks and answers.

    python scripts/ask.py checkpoints/gsm-coconut/best "Ann has 3 boxes of 4 pens. How many pens are there?"
    python scripts/ask.py checkpoints/gsm-coconut/best                 a question on each line of the input
    python scripts/ask.py CHECKPOINT QUESTION --thoughts 3             other than it was trained with
    python scripts/ask.py CHECKPOINT QUESTION --show-thoughts          the tokens that each thought is closest to
    python scripts/ask.py CHECKPOINT QUESTION --json                   for programs, a line for each question

Prompts are made and answers read as in validation. After a question that cannot be asked, such as one that is too long,
the next one follows; the exit code at the end is 2 then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from config import UserError  # noqa: E402
from dataset import MyCollator, model_args  # noqa: E402
from evaluate import OpenedCheckpoint, open_checkpoint, predict, until_eos  # noqa: E402  # noqa: E402

TOP = 5  # tokens that are shown of each thought


def ask(opened: OpenedCheckpoint, question: str, show_thoughts: bool = False) -> dict:
    """What the model says: question, generated, answer, new_tokens, seconds, and with show_thoughts their tokens."""
    started, model, limit = time.perf_counter(), opened.model, opened.config.answer_limit
    batch = model_args(MyCollator(opened.pretrained.tokenizer, model.latent_token_id)(opened.prompts([question])))
    [output] = model.generate(**batch, max_new_tokens=limit).tolist()
    seconds = time.perf_counter() - started
    new = until_eos(output[batch["input_ids"].shape[1] :], model.eos_token_id, limit)
    thoughts = (batch["input_ids"] == model.latent_token_id).sum().item()
    problem = {"question": question, "answer": "", "steps": []}
    said = predict(problem, 0, new, thoughts, opened.pretrained.tokenizer, opened.config.method)
    said = {key: said[key] for key in ("question", "generated", "answer", "new_tokens")} | {"seconds": seconds}
    return said | ({"thoughts": closest_tokens(opened, batch["input_ids"][0])} if show_thoughts else {})


@torch.no_grad()
def closest_tokens(opened: OpenedCheckpoint, input_ids: torch.Tensor) -> list[list[tuple[str, float]]]:
    """For each thought of a prompt (columns,), its most probable tokens by the vocabulary projection."""
    states = opened.model.inputs_embeds(input_ids)[input_ids == opened.model.latent_token_id]  # (thoughts, hidden)
    top = opened.model.logits(states).softmax(-1).topk(TOP)  # (thoughts, TOP)
    decode = opened.pretrained.tokenizer.decode
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


def respond(opened: OpenedCheckpoint, question: str, arguments: argparse.Namespace) -> int:
    """Prints what the model says, or why it cannot be asked this; returns the exit code."""
    try:
        said = ask(opened, question, arguments.show_thoughts)
    except UserError as error:
        return refuse(error)
    print(json.dumps(said, ensure_ascii=False) if arguments.json else format_answer(said), flush=True)
    return 0


def refuse(error: UserError) -> int:
    """Tells of a mistake; returns its exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2


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
        opened = open_checkpoint(arguments.checkpoint, arguments.thoughts)
    except UserError as error:
        sys.exit(refuse(error))
    asked = [arguments.question] if arguments.question else questions()
    if code := max((respond(opened, question, arguments) for question in asked), default=0):
        sys.exit(code)


if __name__ == "__main__":
    main()
