"""Tables what only_eval found: accuracy on each test set, in %, with Wilson's 95 % interval.

    python scripts/evaluations.py checkpoints/mini-cot-seed0 checkpoints/mini-coconut-seed0
    python scripts/evaluations.py results/mini/*-seed0.yaml       what scripts/record.py kept of such runs

Reads eval_CHECKPOINT/metrics_TESTSET.yaml in the runs' directories; of a test set that was asked twice, the latest.
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
    """Return what only_eval found of a run: {(checkpoint, test set): the latest metrics}."""
    if directory.suffix == ".yaml":  # recorded
        lines = map(json.loads, read_file(directory.with_suffix(".jsonl")).splitlines())
        return {(line["checkpoint"], Path(line["val_path"]).stem): line for line in lines if "val_path" in line}
    found = {}
    for path in sorted(directory.glob("eval_*/metrics_*.yaml"), key=lambda path: (len(path.stem), path.stem)):
        metrics = yaml.safe_load(read_file(path))  # NAME, NAME_2, ... NAME_10: in the order of writing
        if "problems" not in metrics:  # written before they were counted there
            predictions = path.with_name(f"{path.stem.replace('metrics', 'predictions', 1)}.jsonl")
            metrics["problems"] = len(read_file(predictions).splitlines())
        found[path.parent.name.removeprefix("eval_"), Path(metrics["val_path"]).stem] = metrics
    return found


def percent(metrics: dict) -> str:
    """An accuracy with its interval."""
    accuracy, problems = metrics["eval/acc"], metrics["problems"]
    low, high = wilson(round(accuracy * problems), problems)
    return f"{100 * accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(directories: list[Path]) -> str:
    """The table as Markdown: a row for each run and checkpoint, a column for each test set."""
    rows = {}
    for directory in directories:
        for (checkpoint, name), metrics in read_evaluations(directory).items():
            run = directory.name.removesuffix(".yaml")
            row = rows.setdefault((directory, checkpoint), {"run": run, "checkpoint": checkpoint})
            row[f"{name} %"] = percent(metrics)
    return markdown(list(rows.values()))


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a table in Markdown, the columns in the order in which they come up."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, save_path/name")
    arguments = parser.parse_args(words)
    try:
        for directory in arguments.runs:
            if not read_evaluations(directory):
                raise UserError(f"{directory}: no evaluation in it; run.py with only_eval=True writes one")
        print(table(arguments.runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
