"""Analyze a trained model: the paper's analysis and further experiments, as a report.

    python scripts/analyze.py checkpoints/prosqa-coconut/best --data data/prosqa_test.json
    python scripts/analyze.py CHECKPOINT --beside checkpoints/prosqa-cot/best checkpoints/prosqa-pause-as-thought/best
    python scripts/analyze.py CHECKPOINT --questions k_sweep search --limit 100 --problem 7

Writes CHECKPOINT/../analysis_CHECKPOINT/: report.html (self-contained), a CSV and an SVG per figure, problems.jsonl,
thoughts.safetensors. Questions: k_sweep (k thoughts, then language), search (the search tree), lens (thoughts
projected onto the vocabulary), interventions (thoughts replaced), probes (linear probes of the hidden states),
operands (GSM8k: do thoughts follow a changed number?).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers

from components.display import print_without_errors
from components.run_directory import locate
from config import UserError, read_yaml


def run_data(checkpoint: str, data: list[str] | None) -> tuple[str | list[str], dict | None]:
    """Return data, by default the val_path of the run that a checkpoint belongs to, and the run's columns."""
    path = locate(checkpoint).resolve().parent / "config.yaml"
    if not data and not path.exists():
        raise UserError(f"--data: missing, and there is no {path} to take val_path from; pass a data file")
    config = read_yaml(path) if path.exists() else {}
    return data or config["val_path"], config.get("columns")


def positive_int(text: str) -> int:
    """Parse an argument that must be 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Analyze the checkpoint given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder, such as checkpoints/NAME/best")
    parser.add_argument("--data", action="append", help="data file; may be repeated (default: the run's val_path)")
    parser.add_argument("--questions", nargs="+", metavar="QUESTION", help="default: all that apply")
    parser.add_argument("--beside", nargs="+", default=[], metavar="CHECKPOINT", help="models for comparison")
    parser.add_argument("--limit", type=positive_int, default=500, help="number of problems (500)")
    parser.add_argument("--batch", type=positive_int, default=64, help="batch size (64)")
    parser.add_argument("--problem", type=int, default=0, help="problem to draw (0)")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()  # keep only those of the analysis
    try:
        try:
            from analysis.study import QUESTIONS, study
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed; pip install -r requirements.txt") from error
        if unknown := set(args.questions or []) - set(QUESTIONS):
            raise UserError(f"--questions {', '.join(sorted(unknown))}: unknown; choose from {', '.join(QUESTIONS)}")
        data, columns = run_data(args.checkpoint, args.data)
        sizes = {"columns": columns, "limit": args.limit, "batch_size": args.batch, "chosen": args.problem}
        study(args.checkpoint, data, args.questions, args.beside, **sizes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    print_without_errors()
    sys.exit(main())
