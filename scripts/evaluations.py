"""Tabulate the results of only_eval: accuracy per test set in %, with a Wilson 95 % interval.

    python scripts/evaluations.py checkpoints/mini-cot-seed0 checkpoints/mini-coconut-seed0
    python scripts/evaluations.py results/mini/*-seed0.yaml       recorded runs (scripts/record.py)

Reads eval_CHECKPOINT/metrics_TESTSET.yaml in the run directories. If an evaluation was repeated (the same data, method,
stage, number of thoughts and numeric_answers), the latest counts; others get rows of their own. Two
different test sets with the same name are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from runs import UserError, read_file

from analysis.statistics import wilson
from components.data_sources import data_name


@dataclass(frozen=True)
class Setting:
    """What an evaluation measured; None where a file of an earlier version does not say.

    test_set: the `data_name`; data_digest: that of its content.
    """

    checkpoint: str
    test_set: str
    data_digest: str | None
    method: str | None
    stage: int | None
    thoughts: int | None
    numeric_answers: bool | None

    @classmethod
    def of(cls, metrics: dict, checkpoint: str) -> Setting:
        """Read the setting in the metrics of an evaluation of a checkpoint."""
        keys = ("data_digest", "method", "stage", "thoughts", "numeric_answers")
        return cls(checkpoint, data_name(metrics["val_path"]), *map(metrics.get, keys))


def metrics_files(directory: Path, checkpoint: str = "*") -> list[Path]:
    """List the metrics of a run's evaluations, of one checkpoint or all, in the order written: NAME, NAME_2, ..."""
    files = directory.glob(f"eval_{checkpoint}/metrics_*.yaml")
    return sorted(files, key=lambda path: (len(path.stem), path.stem))


def read_evaluations(directory: Path) -> dict[Setting, dict]:
    """Read the evaluations of a run: {setting: latest metrics}."""
    found = {}
    if directory.suffix == ".yaml":  # recorded
        for line in map(json.loads, read_file(directory.with_suffix(".jsonl")).splitlines()):
            if "val_path" in line:
                found[Setting.of(line, line["checkpoint"])] = line
        return found
    for path in metrics_files(directory):
        metrics = yaml.safe_load(read_file(path))
        if "problems" not in metrics:  # an older file
            predictions = path.with_name(f"{path.stem.replace('metrics', 'predictions', 1)}.jsonl")
            metrics["problems"] = len(read_file(predictions).splitlines())
        setting = Setting.of(metrics, path.parent.name.removeprefix("eval_"))
        found[setting] = metrics
    return found


def percent(metrics: dict) -> str:
    """Format an accuracy with its confidence interval."""
    accuracy, problems = metrics["eval/acc"], metrics["problems"]
    low, high = wilson(round(accuracy * problems), problems)
    return f"{100 * accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(directories: list[Path]) -> str:
    """Render a Markdown table with a row per run, checkpoint, method, stage, thoughts and numeric_answers, and a
    column per test set. Raises UserError if test sets of the same name have different contents."""
    rows, digests = {}, {}
    for directory in directories:
        for setting, metrics in read_evaluations(directory).items():
            name, digest = setting.test_set, setting.data_digest
            if digest and digests.setdefault(name, (digest, directory))[0] != digest:
                raise UserError(
                    f"{directory}: {metrics['val_path']} differs from the file of that name in the evaluation of "
                    f"{digests[name][1]}; remove the metrics_{name}*.yaml of one of them"
                )
            values = {key: getattr(setting, key) for key in ("method", "stage", "thoughts", "numeric_answers")}
            shown = {key: str(value) for key, value in values.items() if value is not None}
            run = {"run": directory.name.removesuffix(".yaml"), "checkpoint": setting.checkpoint}
            row = rows.setdefault((directory, setting.checkpoint, *values.values()), run | shown)
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
