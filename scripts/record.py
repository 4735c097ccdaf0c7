"""Record finished runs as a folder of results, a reference for scripts/compare.py.

    python scripts/record.py results/ring checkpoints/ring-cot-seed* checkpoints/ring-coconut-seed* \\
        --command "python preprocessing/ring.py" --command "python scripts/table1.py ring --seeds 3"

Runs that differ only in their seed share a row of the table. The folder contains README.md, curves.svg and, per run,
RUN.yaml (its config) and RUN.jsonl (mean training loss and validation of each epoch, and the tests). An existing folder
is never overwritten. Needs scipy (requirements-extra.txt).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import plot
import yaml
from evaluations import markdown, read_evaluations, table
from runs import ROOT, FinishedRun, UserError, files, read_file, read_run

from config import PATH_KEYS, Config
from curriculum import ALL_STEPS, num_placeholders


def check(runs: list[FinishedRun]) -> None:
    """Raise UserError for unfinished runs, duplicate names, and duplicate seeds in a row of the table."""
    for run in runs:
        if (epochs := max(run.stages)) < run.config["num_epochs"]:
            raise UserError(
                f"{run.directory}: {epochs} of {run.config['num_epochs']} epochs are finished; let it finish"
            )
    for key, groups in [("name", [runs]), ("seed", plot.group(runs))]:
        for group in groups:
            value, count = Counter(run.config[key] for run in group).most_common(1)[0]
            if count > 1:
                raise UserError(f"{key} {value}: duplicate among {', '.join(str(run.directory) for run in group)}")


def recorded_metrics(run: FinishedRun) -> Iterator[dict]:
    """Yield the lines of RUN.jsonl: mean training loss and validation of each epoch, then the tests."""
    losses = run.curves["training loss"]
    for epoch, validation in run.validations.items():
        if epoch in losses:
            yield {"step": validation["step"], "train/epoch": epoch, "train/loss": losses[epoch]}
        yield validation
    for setting, test in read_evaluations(run.directory).items():
        yield test | {"checkpoint": setting.checkpoint, "val_path": project_relative(test["val_path"])}


def config_text(run: FinishedRun) -> str:
    """Return the text of RUN.yaml: the run's config, with project paths made relative and other local paths reset."""
    comments = re.findall(r"^#.*\n", read_file(files(run.directory)[0]), re.MULTILINE)
    paths = {key: project_relative(run.config[key]) for key in PATH_KEYS}
    paths |= {"save_path": "checkpoints", "data_cache": None}
    return "".join(comments) + yaml.safe_dump(run.config | paths, sort_keys=False)


def project_relative(path: str | list[str] | None) -> str | list[str] | None:
    """Make a path inside the project, or each of several, relative to its root; return others unchanged."""
    if isinstance(path, list):
        return [project_relative(part) for part in path]
    return str(Path(path).relative_to(ROOT)) if path and Path(path).is_relative_to(ROOT) else path


def spread(values: list[float]) -> str:
    """Format percentages as mean ± standard deviation (95 % t-interval of the mean); a single value as it is."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        raise UserError("scipy is not installed; pip install -r requirements-extra.txt") from error
    deviation = statistics.stdev(values)
    half = t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values))
    return f"{mean:.1f} ± {deviation:.1f} ({max(0, mean - half):.1f} to {min(100, mean + half):.1f})"


def row(label: str, seeds: list[FinishedRun]) -> dict[str, str]:
    """Render the table row of a group of seeds: {column: text}."""
    cells = {"method": label.removesuffix(plot.seed_note(len(seeds))), "seeds": str(len(seeds))}
    cells["accuracy %"] = spread([100 * run.best["eval/acc"] for run in seeds])
    if all("eval/cot_em" in run.best for run in seeds):
        cells["chain right %"] = spread([100 * run.best["eval/cot_em"] for run in seeds])
    cells["tokens"] = f"{statistics.mean(run.best['eval/new_tokens'] for run in seeds):.1f}"
    tests = [tests_of(run, run.best["eval/epoch"]) for run in seeds]
    for name in tests[0]:
        if all(name in test for test in tests):
            cells[f"{name} %"] = spread([100 * test[name]["eval/acc"] for test in tests])
    return cells


def tests_of(run: FinishedRun, epoch: int) -> dict[str, dict]:
    """Return the tests of the checkpoint of an epoch as it was trained: {test set: metrics}.

    Those with another method, stage or number of thoughts are left out; an earlier version recorded the stage only.
    """
    config, stage = Config(run.config), run.stages[epoch]
    trained = {"checkpoint": f"checkpoint_{epoch}", "method": config.method, "stage": stage}
    trained["thoughts"] = num_placeholders(stage, ALL_STEPS, config, training=False)
    return {
        setting.test_set: metrics
        for setting, metrics in read_evaluations(run.directory).items()
        if all(getattr(setting, key) in (None, value) for key, value in trained.items())
    }


def minutes(run: FinishedRun) -> str:
    """Estimate the minutes from start to last validation by file modification times."""
    predictions = [run.directory / f"predictions_{epoch}.jsonl" for epoch in (min(run.stages), max(run.stages))]
    if not all(path.exists() for path in predictions):
        return "unknown"
    start, first, last = (path.stat().st_mtime for path in (run.directory / "config.yaml", *predictions))
    return f"{(last - start) / 60:.1f}" if start < first else "unknown (resumed)"


def provenance(run: FinishedRun) -> dict[str, str]:
    """Return a table row with the run's length, hardware, versions and commit."""
    last = max(run.stages)
    cells = {"run": run.config["name"], "epochs": str(last), "steps": str(run.steps[last]), "minutes": minutes(run)}
    names = ("device", "python", "torch", "transformers", "commit")
    return cells | {name: run.versions.get(name, "not recorded") for name in names}


def readme(folder: Path, runs: list[FinishedRun], commands: list[str], chance: float | None) -> str:
    """Render README.md."""
    groups = plot.group(runs)
    rows = [row(label, seeds) for label, seeds in zip(plot.labels(groups), groups, strict=True)]
    tests = table([run.directory for run in runs if read_evaluations(run.directory)])
    names = " ".join(f"checkpoints/{run.config['name']}" for run in runs)
    option = "" if chance is None else f" --chance {chance:g}"
    commands = [*commands, f"python scripts/record.py {folder} {names}{option}"]
    listing = "\n".join(f"    {command}" for command in commands)
    return f"""\
# {folder.name}

{markdown(rows)}

Validation accuracy, chains that are correct throughout, and generated tokens (including thoughts), all for the
checkpoint `best`, the best one of the last stage, which is also the one tested. Mean ± standard deviation over seeds
(95 % t-interval of the mean); for a single seed, just the value.

![Accuracy and loss over the epochs](curves.svg)

    python scripts/plot.py {folder}/*.yaml{option} --out {folder}/curves.svg

{TESTS.format(table=tests) if tests else ""}## Commands

{listing}

`python run.py {folder}/RUN.yaml` retrains one of them. To compare your own run with them:

    python scripts/compare.py checkpoints/RUN {folder}

{markdown([provenance(run) for run in runs])}

Minutes are from the start to the last validation, on a machine that may have been busy with other work.
"""


TESTS = """\
## Tests

Each run individually, with Wilson's 95 % interval over the problems:

{table}

"""


def write(folder: Path, runs: list[FinishedRun], commands: list[str], chance: float | None = None) -> None:
    """Write the folder of results; remove it again on failure. Raises UserError if it exists."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; results are never overwritten, choose another folder") from error
    try:
        for run in runs:
            config, metrics = files(folder / f"{run.config['name']}.yaml")
            config.write_text(config_text(run), encoding="utf-8")
            metrics.write_text("".join(json.dumps(line) + "\n" for line in recorded_metrics(run)), encoding="utf-8")
        (folder / "README.md").write_text(readme(folder, runs, commands, chance), encoding="utf-8")
        plot.save(plot.group(runs), folder / "curves.svg", chance)
    except BaseException:
        shutil.rmtree(folder)
        raise


def main(argv: list[str] | None = None) -> int:
    """Record the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder, results/NAME")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, save_path/name")
    parser.add_argument(
        "--command", action="append", default=[], help="a command that produced the runs, for README.md"
    )
    parser.add_argument("--chance", type=float, metavar="PERCENT", help="accuracy of guessing, drawn into the figure")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(directory) for directory in args.runs]
        check(runs)
        write(args.folder, runs, args.command, args.chance)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
