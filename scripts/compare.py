"""Compare runs with a reference: same config, and curves within the spread of the reference's seeds?

    python scripts/compare.py checkpoints/smoke-coconut-seed0 results/smoke
    python scripts/compare.py RUN [RUN ...] REFERENCE     REFERENCE: a folder with runs of several seeds, or a run

A run is a run directory or a RUN.yaml written by scripts/record.py.

The reference consists of the runs of the same method on the same data, over the epochs that all runs have finished. The
allowed range of a curve is the minimum to maximum over seeds, extended on both sides by its width, or by the margins
below if they are larger. A curve is outside if two epochs in a row, or the last epoch, are. With a single seed, only
the margins apply: another seed may well differ by more.

Exit code: 0 match; 1 a config key or a curve differs; 2 nothing to compare (another method, other data, no epoch).
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

from runs import DATA_KEYS, FinishedRun, UserError, differences, find_runs, read_run

ACCURACY_MARGIN = 0.05
LOSS_MARGIN, MIN_LOSS_MARGIN = 0.1, 0.01  # relative; absolute (nats), because losses near zero vary by multiples


def reference_seeds(folder: Path, run: FinishedRun) -> list[FinishedRun]:
    """Read the reference runs of the method of `run`.

    Raises: UserError if there is none, if they differ in more than their seed, or if `run` has other data.
    """
    reference = [read_run(path) for path in find_runs(folder)]
    if not reference:
        raise UserError(f"{folder}: no run found; pass a run directory, a folder of them, or a folder in results/")
    seeds = [other for other in reference if other.config["method"] == run.config["method"]]
    if not seeds:
        methods = ", ".join(sorted({other.config["method"] for other in reference}))
        raise UserError(f"{run.directory} has method {run.config['method']}, but {folder} only has {methods}")
    for other in seeds[1:]:
        if keys := differences(seeds[0], other):
            both = f"{seeds[0].directory} and {other.directory}"
            raise UserError(f"{both} differ in {', '.join(keys)}; pass one of them as the reference")
    for key, (here, there) in differences(run, seeds[0]).items():
        if key in DATA_KEYS:
            other = seeds[0].directory
            raise UserError(
                f"{run.directory} has {key} {here}, but {other} has {there}; runs are compared on the same data"
            )
    return seeds


def allowed_range(values: list[float], name: str) -> tuple[float, float]:
    """Return the bounds within which a value passes as that of one more seed; none is below 0, no accuracy above 1."""
    low, high = min(values), max(values)
    margin = ACCURACY_MARGIN if name == "accuracy" else max(LOSS_MARGIN * high, MIN_LOSS_MARGIN)
    margin = max(margin, high - low)
    return max(0.0, low - margin), min(high + margin, 1.0 if name == "accuracy" else math.inf)


def compare_curve(name: str, run: FinishedRun, seeds: list[FinishedRun]) -> tuple[bool, list[str]]:
    """Compare a curve with the reference; return whether it is outside the spread, and a line per such epoch."""
    curves = [seed.curves[name] for seed in (run, *seeds)]
    epochs, lines, outside = sorted(set.intersection(*map(set, curves))), [], []
    for epoch in epochs:
        value, *others = (curve[epoch] for curve in curves)
        low, high = allowed_range(others, name)
        outside.append(not low <= value <= high)
        if outside[-1]:
            where = f"epoch {epoch} (stage {run.stages[epoch]})"
            lines.append(f"  {where}: {name} {value:.3f}, outside {low:.3f} to {high:.3f}")
    return (True, True) in pairwise(outside) or outside[-1:] == [True], lines


def compare(run: FinishedRun, seeds: list[FinishedRun]) -> bool:
    """Print the differences between a run and the reference; return whether they match."""
    common = set.intersection(*(set(each.stages) for each in (run, *seeds)))
    if not common:
        raise UserError(f"{run.directory} has no finished epoch in common with the reference")
    print(f"{run.directory}: {len(common)} epochs compared with {len(seeds)} seed(s) of the reference")
    if len(seeds) == 1:
        print("  single-seed reference: only the margins are allowed, another seed may differ by more")
    keys = differences(run, seeds[0])
    for key, (here, there) in keys.items():
        print(f"  config differs: {key} is {here!r} here, {there!r} in the reference")
    for name, version in seeds[0].versions.items():
        if run.versions.get(name) != version:
            print(f"  {name} {run.versions.get(name)} here, {version} in the reference")
    matches = not keys
    for name in run.curves:
        outside, lines = compare_curve(name, run, seeds)
        rule = " (outside needs two epochs in a row, or the last epoch)" if lines and not outside else ""
        print("\n".join([f"{name}: {'outside' if outside else 'within'} the reference's spread{rule}", *lines]))
        matches &= not outside
    print("matches the reference" if matches else "differs from the reference")
    return matches


def main(argv: list[str] | None = None) -> int:
    """Compare the runs on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, save_path/name")
    parser.add_argument("reference", type=Path, help="folder with runs of several seeds, or a run")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(directory) for directory in args.runs]
        matches = [compare(run, reference_seeds(args.reference, run)) for run in runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(matches) else 1


if __name__ == "__main__":
    sys.exit(main())
