"""Looks inside a trained model: the paper's analysis and more, as a report.

    python scripts/analyze.py checkpoints/prosqa-coconut/best --data data/prosqa_test.json
    python scripts/analyze.py CHECKPOINT --beside checkpoints/prosqa-cot/best checkpoints/prosqa-pause-as-thought/best
    python scripts/analyze.py CHECKPOINT --questions k_sweep search --limit 100 --problem 7

Writes CHECKPOINT/../analysis_CHECKPOINT/: report.html (opens anywhere, needs no network), a CSV and an SVG for each
figure, problems.jsonl, thoughts.safetensors. Questions: k_sweep (k thoughts, then language), search (the search tree),
lens (each thought through the vocabulary projection), interventions (are the thoughts used?), probes (what can be read
off the hidden states), operands (GSM8k: do thoughts follow a changed number?). Needs matplotlib
(requirements-extra.txt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from config import UserError, read_yaml  # noqa: E402


def own_data(checkpoint: str) -> str:
    """The validation data of the run that a checkpoint is of."""
    config = Path(checkpoint).resolve().parent / "config.yaml"
    if not config.exists():
        raise UserError(f"--data: {config} does not tell the data of {checkpoint}; name a file")
    return read_yaml(config)["val_path"]


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, such as checkpoints/NAME/best")
    parser.add_argument("--data", help="the problems (default: what the run was validated on)")
    parser.add_argument("--questions", nargs="+", metavar="QUESTION", help="which (default: all that make sense)")
    parser.add_argument("--beside", nargs="+", default=[], metavar="CHECKPOINT", help="models to set beside it")
    parser.add_argument("--limit", type=positive, default=500, help="how many problems (500)")
    parser.add_argument("--batch", type=positive, default=64, help="problems at once (64)")
    parser.add_argument("--problem", type=int, default=0, help="the one that is drawn (0)")
    arguments = parser.parse_args(words)
    transformers.logging.disable_progress_bar()  # only the analysis' own bars
    try:
        try:
            from analysis.study import QUESTIONS, study
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed; pip install -r requirements-extra.txt") from error
        if unknown := set(arguments.questions or []) - set(QUESTIONS):
            raise UserError(f"--questions {', '.join(sorted(unknown))}: there are {', '.join(QUESTIONS)}")
        data = arguments.data or own_data(arguments.checkpoint)
        sizes = {"limit": arguments.limit, "batch_size": arguments.batch, "chosen": arguments.problem}
        study(arguments.checkpoint, data, arguments.questions, arguments.beside, **sizes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
