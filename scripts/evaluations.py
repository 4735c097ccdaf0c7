"""Tabulate the results of only_eval: accuracy per test set in %, with a Wilson 95 % interval.

    python scripts/evaluations.py checkpoints/mini-cot-seed0 checkpoints/mini-coconut-seed0
    python scripts/evaluations.py results/mini/*-seed0.yaml       recorded runs (scripts/record.py)

Reads eval_CHECKPOINT/metrics_TESTSET.yaml in the run directories; if a test set was evaluated twice, the latest counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml
from runs import UserError, read_file

from analysis.statistics import wilson


def read_evaluations(directory: Path) -> dict[tuple[str, str], dict]:
    """Read the evaluations of a run: {(checkpoint, test set): latest metrics}."""
    if directory.suffix == ".yaml":  # recorded
        lines = map(json.loads, read_file(directory.with_suffix(".jsonl")).splitlines())
        return {(line["checkpoint"], Path(line["val_path"]).stem): line for line in lines if "val_path" in line}
    found = {}
    for path in sorted(directory.glob("eval_*/metrics_*.yaml"), key=lambda path: (len(path.stem), path.stem)):
        metrics = yaml.safe_load(read_file(path))  # in the order written: NAME, NAME_2, ... NAME_10
        if "problems" not in metrics:  # an older file
            predictions = path.with_name(f"{path.stem.replace('metrics', 'predictions', 1)}.jsonl")
            metrics["problems"] = len(read_file(predictions).splitlines())
        found[path.parent.name.removeprefix("eval_"), Path(metrics["val_path"]).stem] = metrics
    return found


def percent(metrics: dict) -> str:
    """Format an accuracy with its confidence interval."""
    accuracy, problems = metrics["eval/acc"], metrics["problems"]
    low, high = wilson(round(accuracy * problems), problems)
    return f"{100 * accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(directories: list[Path]) -> str:
    """Render a Markdown table with a row per run and checkpoint, and a column per test set."""
    rows = {}
    for directory in directories:
        for (checkpoint, name), metrics in read_evaluations(directory).items():
            run = directory.name.removesuffix(".yaml")
            row = rows.setdefault((directory, checkpoint), {"run": run, "checkpoint": checkpoint})
            row[f"{name} %"] = percent(metrics)
    return markdown(list(rows.values()))


def markdown(rows: list[dict[str, str]]) -> str:
    """Render rows as a Markdown table, columns in order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table for the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, save_path/name")
    args = parser.parse_args(argv)
    try:
        for directory in args.runs:
            if not read_evaluations(directory):
                raise UserError(f"{directory}: no evaluation found; run.py with only_eval=True writes one")
        print(table(args.runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
