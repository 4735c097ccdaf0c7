"""Writes finished runs down as a folder of results, which scripts/compare.py takes as a reference.

    python scripts/record.py results/ring checkpoints/ring-cot-seed* checkpoints/ring-coconut-seed* \\
        --command "python preprocessing/ring.py" --command "python scripts/table1.py ring --seeds 3"

Runs that differ in their seed alone are one row of the table. The folder holds curves.svg, README.md and, of each run,
RUN.yaml, its config, and RUN.jsonl: the mean training loss and the validation of each epoch, and the tests. A folder
that exists is left alone. Needs matplotlib and scipy (requirements-extra.txt).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import plot
import yaml
from evaluations import markdown, read_evaluations, table
from runs import ROOT, Finished, UserError, files, read_file, read_run

from config import PATH_KEYS


def check(runs: list[Finished]) -> None:
    """Raises UserError for runs that are not finished, have the same name, or the same seed in one row."""
    for run in runs:
        if (epochs := max(run.stages)) < run.config["num_epochs"]:
            raise UserError(f"{run.directory}: {epochs} of {run.config['num_epochs']} epochs are done; let it finish")
    for key, parts in [("name", [runs]), ("seed", plot.group(runs))]:
        for part in parts:
            if twice := repeated([run.config[key] for run in part]):
                raise UserError(f"{key} {twice[0]}: {', '.join(str(run.directory) for run in part)} have it twice")


def repeated(values: list) -> list:
    """The values that stand more than once in a list."""
    return [value for place, value in enumerate(values) if value in values[:place]]


def thinned(run: Finished) -> Iterator[dict]:
    """Yield what is kept of a run's metrics: each epoch's mean training loss and validation, then the tests."""
    losses = run.curves["training loss"]
    for epoch, validation in run.validations.items():
        if epoch in losses:
            yield {"step": validation["step"], "train/epoch": epoch, "train/loss": losses[epoch]}
        yield validation
    for (checkpoint, _), test in read_evaluations(run.directory).items():
        yield test | {"checkpoint": checkpoint, "val_path": from_root(test["val_path"])}


def config_text(run: Finished) -> str:
    """A run's config.yaml without the folders of one machine; what is in the project is named from its root."""
    comments = re.findall(r"^#.*\n", read_file(files(run.directory)[0]), re.MULTILINE)
    places = {key: from_root(run.config[key]) for key in PATH_KEYS} | {"save_path": "checkpoints", "data_cache": None}
    return "".join(comments) + yaml.safe_dump(run.config | places, sort_keys=False)


def from_root(path: str | None) -> str | None:
    """A path as seen from the project's root, if it lies below."""
    return str(Path(path).relative_to(ROOT)) if path and Path(path).is_relative_to(ROOT) else path


def spread(values: list[float]) -> str:
    """Of values in %: mean ± standard deviation and the 95 % t-interval of the mean; of a single value itself."""
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


def row(label: str, seeds: list[Finished]) -> dict[str, str]:
    """A line of the table: the column names and what stands below them."""
    cells = {"method": label.removesuffix(f" ({len(seeds)} seeds)"), "seeds": str(len(seeds))}
    cells["accuracy %"] = spread([100 * run.best["eval/acc"] for run in seeds])
    if all("eval/cot_em" in run.best for run in seeds):
        cells["chain right %"] = spread([100 * run.best["eval/cot_em"] for run in seeds])
    cells["tokens"] = f"{statistics.mean(run.best['eval/new_tokens'] for run in seeds):.1f}"
    tests = [tests_of_best(run) for run in seeds]
    for name in tests[0]:
        if all(name in test for test in tests):
            cells[f"{name} %"] = spread([100 * test[name]["eval/acc"] for test in tests])
    return cells


def tests_of_best(run: Finished) -> dict[str, dict]:
    """What only_eval found with the checkpoint `best`: {test set: metrics}."""
    best = f"checkpoint_{run.best['eval/epoch']}"
    return {name: found for (checkpoint, name), found in read_evaluations(run.directory).items() if checkpoint == best}


def minutes(run: Finished) -> str:
    """The minutes from a run's start to its last validation, by the times of its files."""
    ends = [run.directory / f"predictions_{epoch}.jsonl" for epoch in (min(run.stages), max(run.stages))]
    if not all(path.exists() for path in ends):
        return "unknown"
    started, first, last = (path.stat().st_mtime for path in (run.directory / "config.yaml", *ends))
    return f"{(last - started) / 60:.1f}" if started < first else "unknown: continued"


def origin(run: Finished) -> dict[str, str]:
    """What a run's numbers depend on, as a line of a table."""
    last = max(run.stages)
    cells = {"run": run.config["name"], "epochs": str(last), "steps": str(run.steps[last]), "minutes": minutes(run)}
    names = ("device", "python", "torch", "transformers", "commit")
    return cells | {name: run.versions.get(name, "not recorded") for name in names}


def readme(folder: Path, runs: list[Finished], commands: list[str]) -> str:
    """The page of a folder of results."""
    groups = plot.group(runs)
    rows = [row(label, seeds) for label, seeds in zip(plot.labels(groups), groups, strict=True)]
    tests = table([run.directory for run in runs if read_evaluations(run.directory)])
    names = " ".join(f"checkpoints/{run.config['name']}" for run in runs)
    commands = [*commands, f"python scripts/record.py {folder} {names}"]
    listing = "\n".join(f"    {command}" for command in commands)
    return f"""\
# {folder.name}

{markdown(rows)}

Validation accuracy, chains that are correct throughout, and generated tokens (including thoughts), all for the
checkpoint `best`, the best one of the last stage, which is also the one tested. Mean ± standard deviation over seeds
(95 % t-interval of the mean); for a single seed, just the value.

![Accuracy and loss over the epochs](curves.svg)

{TESTS.format(table=tests) if tests else ""}## Made by

{listing}

`python run.py {folder}/RUN.yaml` trains one of them again. To compare a run of yours with them:

    python scripts/compare.py checkpoints/RUN {folder}

{markdown([origin(run) for run in runs])}

Minutes are from the start to the last validation, on a machine that may have been busy with other work.
"""


TESTS = """\
## Tests

Each run individually, with Wilson's 95 % interval over the problems:

{table}

"""


def write(folder: Path, runs: list[Finished], commands: list[str]) -> None:
    """Writes all files of a folder of results. Raises UserError if it exists; of a folder that fails nothing stays."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; results are never overwritten, name another folder") from error
    try:
        write_all(folder, runs, commands)
    except BaseException:
        shutil.rmtree(folder)
        raise


def write_all(folder: Path, runs: list[Finished], commands: list[str]) -> None:
    """Writes the files into the folder."""
    for run in runs:
        config, metrics = files(folder / f"{run.config['name']}.yaml")
        config.write_text(config_text(run), encoding="utf-8")
        metrics.write_text("".join(json.dumps(line) + "\n" for line in thinned(run)), encoding="utf-8")
    (folder / "README.md").write_text(readme(folder, runs, commands), encoding="utf-8")
    plot.save(plot.group(runs), folder / "curves.svg")


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to write, results/NAME")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, save_path/name")
    parser.add_argument("--command", action="append", default=[], help="a command that made the runs, for README.md")
    arguments = parser.parse_args(words)
    try:
        runs = [read_run(directory) for directory in arguments.runs]
        check(runs)
        write(arguments.folder, runs, arguments.command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
