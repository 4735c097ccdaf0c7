"""Ask a checkpoint questions and print its output, answer and thoughts.

    python scripts/ask.py checkpoints/gsm-coconut/best "Ann has 3 boxes of 4 pens. How many pens are there?"
    python scripts/ask.py checkpoints/gsm-coconut/best                 read one question per line from stdin, up to exit
    python scripts/ask.py CHECKPOINT QUESTION --thoughts 3             override the number of thoughts
    python scripts/ask.py CHECKPOINT QUESTION --show-thoughts          print the top tokens of each thought
    python scripts/ask.py CHECKPOINT QUESTION --json                   print one JSON object per question

Prompts and answer extraction are those of validation. A question that fails, for example because it is too long, is
reported and skipped; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from components.display import print_without_errors, quiet_libraries
from config import UserError
from curriculum import METHODS
from dataset import MyCollator, model_args
from evaluate import OpenedCheckpoint, open_checkpoint, predict, until_eos

TOP_K = 5  # tokens shown per thought


def ask(checkpoint: OpenedCheckpoint, question: str, show_thoughts: bool = False) -> dict:
    """Generate an answer to one question.

    Returns: question, generated, answer, new_tokens, seconds and, with `show_thoughts`, the top tokens of each thought.
    """
    start, model, limit = time.perf_counter(), checkpoint.model, checkpoint.config.answer_limit
    tokenizer = checkpoint.pretrained.tokenizer
    batch = model_args(MyCollator(tokenizer, model.latent_token_id)(checkpoint.prompts([question])))
    [output] = model.generate(**batch, max_new_tokens=limit).tolist()
    seconds = time.perf_counter() - start
    new_ids = until_eos(output[batch["input_ids"].shape[1] :], model.eos_token_id, limit)
    thoughts = (batch["input_ids"] == model.latent_token_id).sum().item()
    problem = {"question": question, "answer": "", "steps": []}
    prediction = predict(problem, 0, new_ids, thoughts, tokenizer, checkpoint.config)
    result = {key: prediction[key] for key in ("question", "generated", "answer", "new_tokens")} | {"seconds": seconds}
    return result | ({"thoughts": top_tokens(checkpoint, batch["input_ids"][0])} if show_thoughts else {})


@torch.no_grad()
def top_tokens(checkpoint: OpenedCheckpoint, input_ids: torch.Tensor) -> list[list[tuple[str, float]]]:
    """Project each thought of a prompt (length,) onto the vocabulary; return its top tokens and probabilities."""
    thoughts = checkpoint.model.inputs_embeds(input_ids)[input_ids == checkpoint.model.latent_token_id]  # (n, hidden)
    top = checkpoint.model.logits(thoughts).softmax(-1).topk(TOP_K)  # (n, TOP_K)
    decode = checkpoint.pretrained.tokenizer.decode
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(decode(id), p) for id, p in zip(ids, ps, strict=True)] for ids, ps in pairs]


def format_result(result: dict) -> str:
    """Format the output of `ask` for the terminal."""
    lines = [result["generated"]]
    for number, tokens in enumerate(result.get("thoughts", []), 1):
        lines.append(f"thought {number}: " + "  ".join(f"{token!r} {p:.2f}" for token, p in tokens))
    lines.append(f"answer: {result['answer']}   ({result['new_tokens']} tokens, {result['seconds']:.2f} s)")
    return "\n".join(lines)


def read_questions() -> Iterator[str]:
    """Yield the non-empty lines of stdin, up to one that says exit; in a terminal an empty line ends them too."""
    with suppress(ImportError):  # line editing and history in a terminal, where available
        import readline  # noqa: F401
    with suppress(AttributeError):  # not a file
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 spoil their own question only
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("question: " if sys.stdin.isatty() else "").strip()
            if line == "exit" or (not line and sys.stdin.isatty()):
                return
            if line:
                yield line


def thought_count(text: str) -> int:
    """Parse the value of --thoughts."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Answer the question on the command line, or those on stdin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint, such as checkpoints/NAME/best, or a run's folder")
    parser.add_argument("question", nargs="?", help="default: one question per line of stdin")
    parser.add_argument("--thoughts", type=thought_count, help="number of thoughts (or pause tokens)")
    parser.add_argument("--show-thoughts", action="store_true", help="print the top tokens of each thought")
    parser.add_argument("--json", action="store_true", help="print one JSON object per question")
    args = parser.parse_args(argv)
    quiet_libraries()
    failed = False
    try:
        with redirect_stdout(sys.stderr):  # notes; stdout has the answers alone
            checkpoint = open_checkpoint(args.checkpoint, args.thoughts)
        if args.show_thoughts and METHODS[checkpoint.config.method].placeholder != "latent":
            print(f"note: method {checkpoint.config.method} has no thoughts to show", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for question in [args.question] if args.question is not None else read_questions():
        try:
            result = ask(checkpoint, question, args.show_thoughts)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
        else:
            print(json.dumps(result, ensure_ascii=False) if args.json else format_result(result), flush=True)
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    print_without_errors()
    main()
